#!/bin/bash
# Runs a command again until it ends well, as on machines that may be taken away: launch/again.sh COMMAND ...
# SIGTERM and Ctrl-C end the loop, too: the run saves its checkpoint first. After an error it waits, twice as long each
# time, for at most ten minutes; after a command that ran for longer than that, as after the first.
set -m  # the command has a process group of its own: a terminal's Ctrl-C comes to this script alone, which hands it on
wait_seconds=10
trap 'stopped=1; kill -TERM "$child" 2>/dev/null' TERM INT
while :; do
  began=$SECONDS
  "$@" &
  child=$!
  wait "$child"; status=$?
  if [ -n "$stopped" ]; then wait "$child"; exit $?; fi
  [ "$status" -eq 0 ] && exit 0
  [ $((SECONDS - began)) -gt 600 ] && wait_seconds=10
  echo "exit status $status: again in $wait_seconds s" >&2
  sleep "$wait_seconds" & child=$!; wait "$child"
  [ -n "$stopped" ] && exit 1
  wait_seconds=$((wait_seconds * 2 > 600 ? 600 : wait_seconds * 2))
done
