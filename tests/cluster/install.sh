#!/bin/bash
# Installs the daemons of a Slurm cluster from Debian's packages, 3 MB. The tests start daemons of their own, as the current user.
set -euo pipefail
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --no-install-recommends munge slurm-client slurmctld slurmd
