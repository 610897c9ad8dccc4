#!/usr/bin/env bash
# The whole path on one machine: seal a model, start a key broker and a server on free ports, run
# the model as a client. Everything is stopped and removed at the end, whatever happens.
#
#     examples/serve_and_infer.sh
#
# It needs `lasagna` on the path (. .venv/bin/activate). Enclaves are ordinary processes here.
set -euo pipefail

folder=$(mktemp -d)
stop() {
    kill $(jobs -p) 2>/dev/null || true
    wait
    rm -rf "$folder"
}
trap stop EXIT
cd "$folder"

# said LOG PATTERN: wait until the command started last has said it, and print the part in brackets
said() {
    for _ in {1..600}; do
        sed -nE "\#$2#{s#.*$2.*#\1#p;q}" "$1" | grep . && return
        kill -0 $! 2>/dev/null || break
        sleep 0.1
    done
    echo "no '$2' in $1:" >&2
    cat "$1" >&2
    return 1
}

echo "== the model's owner seals it"
lasagna seal --zoo squeezenet --no-profile

echo "== the owner's key broker releases the key to enclaves that run this code"
measurement=$(lasagna measure)
lasagna insecure-broker squeezenet.key --state broker --port 0 \
    --allow-measurement "$measurement" --insecure-allow-emulated >broker.log 2>&1 &
broker=$(said broker.log 'broker on (http:[^ ]+)')
broker_key=$(said broker.log '--broker-key ([0-9a-f]+)')

echo "== the edge server gets the sealed package, and never the key"
lasagna serve squeezenet.lsg --budget 8MB --port 0 --broker "$broker" >serve.log 2>&1 &
url=$(said serve.log 'serving on (http:[^ ]+)')
said serve.log '(model squeezenet: .*)'

echo "== the client verifies the enclave, seals its input and opens the answer"
python -c "import numpy; numpy.save('image.npy', numpy.random.rand(1, 3, 224, 224).astype('f4'))"
lasagna infer "$url" squeezenet --input data_0=image.npy \
    --allow-measurement "$measurement" --broker-key "$broker_key" --insecure-allow-emulated
