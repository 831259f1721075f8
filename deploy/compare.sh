#!/bin/sh
# SPQ beside GPTQ on one card: each server alone on it in turn, A B C, A B C, ..., under the same load, and one report.
#
#   deploy/gptq_checkpoints.sh MODEL && deploy/compare.sh      # docs/deploy.md says what to set in .env before
#
# The servers never share the card: one is started when the one before is gone. So every turn begins with a start,
# which is not measured. The report lies in REPORT_DIR, in a folder of this run. COMPOSE="podman-compose" takes another
# compose program; it must know `up --wait`. Not yet run on a GPU; tests/deploy runs it with a stand-in for the engine.
set -eu
cd "$(dirname "$0")/.."
COMPOSE=${COMPOSE:-docker compose}
SUBJECT=spq-gpu

value() { # NAME: from the environment, else .env, else .env.example, as compose does with its defaults
    eval "found=\${$1:-}"
    for file in .env .env.example; do
        [ -n "$found" ] || [ ! -f "$file" ] || found=$(sed -n "s/^$1=//p" "$file" | tail -n 1)
    done
    echo "$found"
}
compose() {
    # shellcheck disable=SC2086  # "docker compose" is two words
    $COMPOSE "$@"
}

rivals=$(value COMPARE_RIVALS | tr ',' ' ')
models=$(value MODELS_DIR)
reports=$(value REPORT_DIR)
run=$(date -u +%Y%m%d-%H%M%S)
for folder in source $rivals; do
    [ -f "$models/$folder/config.json" ] || {
        echo "$models/$folder is no model folder; deploy/gptq_checkpoints.sh makes those of GPTQ" >&2
        exit 1
    }
done
mkdir -p "$reports/$run"
chown "$(value LOADTEST_USER)" "$reports/$run" 2>/dev/null || true # the load's user writes there; only root can say so

clear_card() {
    # shellcheck disable=SC2086
    compose stop "$SUBJECT" $rivals && compose rm --force "$SUBJECT" $rivals
}
trap 'clear_card >/dev/null 2>&1' EXIT
trap 'exit 130' INT TERM

turn() { # SERVICE NAME ADDRESS BITS: one round of one server
    compose up --detach --wait "$1" || {
        compose logs --tail 50 "$1" >&2
        echo "$1 did not become healthy" >&2
        return 1
    }
    compose run --rm -T loadtest python -m loadtest.compare --model /models/source --out "/report/$run" --add --rounds 1 \
        --subject spq --server "$2=http://$3:8000" ${4:+--bits "$2=$4"} --levels "$(value COMPARE_LEVELS)" \
        --prompt-tokens "$(value COMPARE_PROMPT_TOKENS)" --new-tokens "$(value COMPARE_NEW_TOKENS)" --api-key "$(value SPQ_API_KEY)"
    clear_card
}

compose build "$SUBJECT" loadtest
clear_card
round=0
while [ "$round" -lt "$(value COMPARE_ROUNDS)" ]; do
    round=$((round + 1))
    echo "round $round" >&2
    turn "$SUBJECT" spq spq ""
    for rival in $rivals; do
        bits=${rival#gptq-}
        turn "$rival" "$rival" gptq "${bits%bit}"
    done
done
echo "report: $reports/$run"
