"""What secure_mqtt_client.py stands on, and all that goes beyond the lab.

Each module imports only from those above it:

errors         what can go wrong, in the user's words
terminal       what a terminal must not be made to do
log            the log: for a person, or for programs
actions        topics, NetIDs and the lab's six actions
settings       what the command line says, and the files that it names
certificates   when certificates end
streams        standard input, output and error
tls            TLS with the broker
faults         why there is no connection to the broker
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
responder      the other end
local          what --local brings: a broker, and a responder
"""
