#!/bin/sh
# Starts the Sentinel beside a Valkey server, which it asks who the primary is. Names are announced, as addresses change.
set -eu
umask 077

primary=""
while [ -z "$primary" ]; do
  role=$(REDISCLI_AUTH=$VALKEY_PASSWORD timeout 2 valkey-cli -h "$SELF" -p 6379 --raw ROLE 2>/dev/null) || role=""
  case "$role" in
    master*) primary=$SELF ;;
    slave*) primary=$(echo "$role" | sed -n 2p) ;;
    *) sleep 1 ;;
  esac
done

cat > "$RUN_DIR/sentinel.conf" << CONFIGURATION
bind ${LISTEN:-* -::*}
port 26379
dir $RUN_DIR
requirepass $VALKEY_PASSWORD
sentinel resolve-hostnames yes
sentinel announce-hostnames yes
sentinel announce-ip $SELF
sentinel monitor warmroute $primary 6379 2
sentinel auth-pass warmroute $VALKEY_PASSWORD
sentinel down-after-milliseconds warmroute ${DOWN_AFTER_MS:-5000}
sentinel failover-timeout warmroute ${FAILOVER_MS:-15000}
sentinel parallel-syncs warmroute 1
CONFIGURATION
echo "primary: $primary"
exec valkey-server "$RUN_DIR/sentinel.conf" --sentinel
