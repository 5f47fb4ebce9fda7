#!/usr/bin/env bash
# Ask a node with Mosquitto's own client and print the answer's text (MQTT 5; needs mosquitto-clients and jq).
#   examples/mosquitto_rr.sh NODE QUESTION [OPTIONS OF mosquitto_rr, for example -h broker.lan -u me -P secret]
# Exit status: 0 answered, 1 an error was answered, else that of mosquitto_rr (27: nothing came in time).
set -euo pipefail
node=$1 question=$2
shift 2
# The response topic is ours alone: two questions at once would else read each other's answers.
# Where there is a login, it comes first: so a broker can keep answers from others (examples/mosquitto).
login=
for ((at = 1; at < $#; at++)); do
    following=$((at + 1))
    case ${!at} in -u | --username) login=${!following}/ ;; esac
done
reply=clients/${login}rr-$$-$RANDOM/answer
request=$(jq -cn --arg text "$question" '{messages: [{role: "user", content: $text}], expires_in: 60}')
answer=$(mosquitto_rr "$@" -q 1 -W 60 -t "nestd/v1/$node/request/generate" -e "$reply" -m "$request")
if [ "$(jq -r .event <<<"$answer")" = error ]; then
    jq -r '"\(.status) \(.code): \(.message)"' <<<"$answer" >&2
    exit 1
fi
jq -r .text <<<"$answer"
