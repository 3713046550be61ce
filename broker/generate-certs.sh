#!/usr/bin/env bash
#
# Make a certificate authority in DIR and, signed by it, a key and a certificate
# for each NAME.
#
#     broker/generate-certs.sh DIR NAME...
#     broker/generate-certs.sh certs localhost responder alice
#
# DIR/ca.crt      the CA's certificate: what the broker and its clients trust
# DIR/ca.key      its key; whoever has it can be anyone: keep it off the broker
# DIR/NAME.crt    subject CN=NAME, DNS name NAME
# DIR/NAME.key    its key: EC P-256, not encrypted, mode 0600
# DIR/NAME.pem    both, mode 0600: the file for --identity
#
# DIR is made if need be. It has to be your own, and nobody else may be able to
# write to it, or to put something else in its place.
#
# What a certificate is for follows from its name:
#
#     localhost, or a name with a dot    a broker's host name: TLS server only
#     responder                          TLS client, and server: see below
#     any other                          a NetID: TLS client only
#
# It lists the files that it made on stdout. Run it again to add names: the CA
# stays. It overwrites nothing: to renew a certificate, move the three old files
# away first. It makes all the names or none.
# Exit status: 0 done, 1 failed, 2 wrong usage; then nothing was changed.
#
# To change: the two periods of validity below.

set -euo pipefail
export LC_ALL=C # so that [a-z] is 26 letters

ca_days=3650
leaf_days=365

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

# A name becomes a file name, a line for openssl, a user name and a topic level, so it has to be
# harmless as each: above all no "/", "+" or "#", which an access rule could take for others' topics.
# Lower case only: DNS names ignore case and topics do not, so "Alice" could sign for "alice".
check_name() {
    local label='[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?'
    if [[ ! $1 =~ ^$label(\.$label)*$ ]] || ((${#1} > 64)); then # a CN ends at 64
        die 2 "not a name for a certificate: '$1'" \
            "lower-case letters, digits and inner hyphens, up to 63; with dots, a host name"
    fi
    [[ ! $1 =~ \.[0-9]+$ ]] || die 2 "an address, not a name: '$1'" "give the broker's host name"
    # ca.crt is the CA's; status/# and shared/# are for all, so a NetID's topics must not be there.
    [[ $1 != ca && $1 != status && $1 != shared ]] || die 2 "the name '$1' is reserved"
}

exists() { # even as a link that leads nowhere
    [[ -e $1 || -L $1 ]]
}

check_new() {
    local file
    for file in "$1".{crt,key,pem}; do
        ! exists "$file" || die 1 "$dir/$file exists; nothing was changed" \
            "move the old files of '$1' away to make new ones, or leave it out"
    done
}

# The extensions of NAME's certificate in openssl's terms (RFC 5280, 4.2). A responder is a client
# of the broker; NetIDs verify the signature of its key exchange as that of a server.
extensions() { # NAME
    local names="DNS:$1" usage=clientAuth
    case $1 in
        localhost) names+=,IP:127.0.0.1,IP:::1 usage=serverAuth ;;
        *.*) usage=serverAuth ;;
        responder) usage=serverAuth,clientAuth ;;
    esac
    cat <<END
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = $usage
subjectAltName = $names
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid:always
END
}

# openssl reports its progress on stderr: shown only if it fails.
run_openssl() {
    local said
    said=$(openssl "$@" 2>&1) || die 1 "openssl $1 failed: $said"
}

new_key=(-new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -sha256)

make_ca() {
    run_openssl req -x509 "${new_key[@]}" -days "$ca_days" -config "$new/ca.cnf" \
        -subj "/CN=secure-mqtt CA" -keyout "$new/ca.key" -out "$new/ca.crt"
}

make_leaf() { # NAME CA (its files, without their endings)
    extensions "$1" >"$new/leaf.cnf"
    run_openssl req "${new_key[@]}" -config "$new/ca.cnf" -subj "/CN=$1" \
        -keyout "$new/$1.key" -out "$new/leaf.csr"
    run_openssl x509 -req -in "$new/leaf.csr" -sha256 -days "$leaf_days" \
        -CA "$2.crt" -CAkey "$2.key" -set_serial "0x$(openssl rand -hex 16)" \
        -extfile "$new/leaf.cnf" -out "$new/$1.crt"
    cat "$new/$1.crt" "$new/$1.key" >"$new/$1.pem"
}

if [[ ${1-} == -h || ${1-} == --help ]]; then
    show_help
    exit
fi
(($# >= 2)) || die 2 "usage: generate-certs.sh DIR NAME..."
dir=$1
shift
for name in "$@"; do check_name "$name"; done
[[ -z $(printf '%s\n' "$@" | sort | uniq -d) ]] || die 2 "a name is given twice"
command -v openssl >/dev/null || die 1 "openssl is not installed" "apt install openssl"

# All is made in a directory of its own and moved at the end, so that a failure leaves nothing.
# That directory is also the lock that keeps two runs apart.
new=.new
check_way "$dir"
(umask go-w && mkdir -p -- "$dir")
enter "$dir"
umask 077
mkdir -- "$new" || die 1 "cannot make $dir/$new" \
    "if it exists, another run is at work; if none is, one was killed: remove it"
trap 'rm -rf -- "$new"' EXIT
trap 'exit 130' HUP INT TERM

for name in "$@"; do check_new "$name"; done
cat >"$new/ca.cnf" <<'END'
[req]
distinguished_name = dn
x509_extensions = ca
[dn]
[ca]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
END

ca=ca
made=()
if ! exists $ca.crt && ! exists $ca.key; then
    ca=$new/ca
    make_ca
    made=("$dir"/ca.{crt,key})
elif ! exists $ca.crt || ! exists $ca.key; then
    die 1 "$dir has only one of ca.crt and ca.key" "put the other back, or use another directory"
else
    for file in ca.{crt,key}; do check_file "$file" "$dir/$file"; done
fi
for name in "$@"; do
    make_leaf "$name" "$ca"
    made+=("$dir/$name".{crt,key,pem})
done

trap '' HUP INT TERM # from here on it is done whole
chmod 644 "$new"/*.crt
mv -- "$new"/*.{crt,key,pem} .
printf '%s\n' "${made[@]}"
