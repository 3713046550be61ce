"""What secure_mqtt_client.py stands on, and all that goes beyond the lab.

Each module imports only from those above it:

errors         what can go wrong, in the user's words
terminal       what a terminal must not be made to do
log            the log: for a person, or for programs
actions        topics, NetIDs and the lab's six actions
settings       what the command line says, and the files that it names
certificates   when certificates end
cautions       what is allowed, but unwise: warnings at the start
streams        standard input, output and error
lines          the lines of a session: read, sent and answered
tls            TLS with the broker
faults         why there is no connection to the broker
mailboxes      what has come over a connection and is not handled yet, and what has gone
postponed      an import that waits until something is used
connection     the connection to the broker: the only user of paho
suites         how two ends agree on keys, and how they encrypt with them
hints          what was probably meant, where the command line is wrong
config         the file that --config names
command_line   what may be in the command line, and what it means
signatures     signed exchanges: who signs, and whose signatures count
exchange       the client's side of one key exchange
calls          a message to a responder, and the answer to it
workers        work in child processes, and in a thread with a deadline
session        each line of standard input is a request
fixed_base     key pairs in the lab's group, made in a fifth of the time
turns          a queue in which NetIDs take turns
keyring        what a responder keeps of its NetIDs: keys, and for how long
replays        which signed key exchanges were here before
chores         what takes a responder long, so that its workers do it
pool           who of a responder's workers is idle, and who has whose result
powers         powers in the lab's group: made ahead, or when somebody waits for them
labour         messages wait for their NetID's turn, and NetIDs for a worker
reports        what a responder says of its work: its log, and its counts
replies        what a responder says to a message: an answer, or nothing
exchanges      how a responder answers key exchanges
requests       how a responder answers requests
topics         what many share: their members, and the keeper
desk           where a responder takes messages in, and answers them in turn
status         the status that a responder publishes
size_limit     how large an answer may be for a broker
responder      the other end: it stays connected
local          what --local brings: a broker, and a responder
not_installed  what answers to pip install: the program is run where it lies
"""
