#!/bin/sh
# Before a pod goes: if its server is the primary, have a replica take over, so that nobody waits for the Sentinels to
# find out. Gives up after some seconds, as the pod goes in any case.
export REDISCLI_AUTH=$VALKEY_PASSWORD
role() { timeout 2 valkey-cli -h "$SELF" -p 6379 --raw ROLE | head -n 1; }

[ "$(role)" = master ] || exit 0
for peer in $PEERS; do
  [ "$peer" = "$SELF" ] && continue
  timeout 2 valkey-cli -e -h "$peer" -p 26379 --raw SENTINEL failover warmroute && break
done
for _ in 1 2 3 4 5 6 7 8 9 10; do
  [ "$(role)" = master ] || exit 0
  sleep 1
done
exit 0
