#!/usr/bin/env bash
# The launch scripts on real clusters that this machine plays: tests/multihost.sh and tests/slurm.sh, one after the other.
#
#   sudo bash tests/clusters.sh     (about six minutes on 2 cores)
#
# They need root and Debian's pdsh, openssh-server, iproute2, slurm-wlm and munge, which are installed when they are
# missing. Where that cannot be, each says why it is skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
missing=()
for pair in pdsh:pdsh sshd:openssh-server ip:iproute2 slurmctld:slurm-wlm munged:munge; do
    command -v "${pair%%:*}" >/dev/null || missing+=("${pair#*:}")
done
if [ ${#missing[@]} -gt 0 ] && [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -q && apt-get install -qy --no-install-recommends "${missing[@]}"; } >/dev/null ||
        echo "clusters: could not install ${missing[*]}"
fi
timeout 1200 bash tests/multihost.sh
timeout 900 bash tests/slurm.sh
