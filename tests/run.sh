#!/usr/bin/env bash
# Make a virtual environment with jhessians and its oracles, and run the tests in it.
# Arguments go to pytest, for example: bash tests/run.sh -k bergson -m slow
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
environment=${TEST_ENVIRONMENT:-.venv-test}
[ -x "$environment/bin/python" ] || "$python" -m venv "$environment"
pip() { "$environment/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }

pip --editable '.[test]'
# The oracles. Their own requirements would bring torchvision and CUDA, which they run without.
pip 'torch==2.13.0'
pip --no-deps 'bergson==2.5.1' 'torchopt==0.7.3' bitsandbytes 'kronfluence==1.0.1' einconv
pip --requirement tests/oracles/requirements.txt

# Two processes: compilations, which take most of the time, use one core each.
exec "$environment/bin/python" -m pytest --numprocesses 2 --dist loadfile "$@"
