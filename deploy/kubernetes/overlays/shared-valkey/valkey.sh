#!/bin/sh
# Starts a Valkey server: as a replica of the primary that the Sentinels name, or of the first pod where none answers
# yet; the first pod is then the primary itself. Everything it keeps is a cache: whoever starts empty fills up again.
# SELF is this pod's name, PEERS those of all, RUN_DIR is writable.
set -eu
umask 077

primary=""
for peer in $PEERS; do
  answer=$(REDISCLI_AUTH=$VALKEY_PASSWORD timeout 2 valkey-cli -h "$peer" -p 26379 --raw \
    SENTINEL get-master-addr-by-name warmroute 2>/dev/null | head -n 1) || answer=""
  case " $PEERS " in
    *" $answer "*) if [ -n "$answer" ]; then primary=$answer; break; fi ;;
  esac
done
primary=${primary:-${PEERS%% *}}

cat > "$RUN_DIR/valkey.conf" << CONFIGURATION
bind ${LISTEN:-* -::*}
port 6379
dir $RUN_DIR
requirepass $VALKEY_PASSWORD
masterauth $VALKEY_PASSWORD
replica-announce-ip $SELF
maxmemory ${MAX_MEMORY}
maxmemory-policy allkeys-lru
save ""
appendonly no
repl-diskless-sync yes
repl-diskless-load on-empty-db
repl-backlog-size 256mb
client-output-buffer-limit replica 2gb 1gb 60
CONFIGURATION
if [ "$primary" != "$SELF" ]; then
  echo "replicaof $primary 6379" >> "$RUN_DIR/valkey.conf"
fi
echo "primary: $primary"
exec valkey-server "$RUN_DIR/valkey.conf"
