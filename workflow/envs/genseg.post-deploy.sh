set -eu
pip install --requirement requirements.txt
pip install --no-deps --editable .
