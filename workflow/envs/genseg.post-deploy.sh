set -euo pipefail
pip install --requirement requirements.txt
pip install --no-deps --editable .
