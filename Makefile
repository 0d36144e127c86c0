# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# two processes run the tests; threads of torch on top would only wait for each other
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
NPU_VENV := .venv-npu
NPU_STAMP := $(NPU_VENV)/.installed
TRITON_VENV := .venv-triton
TRITON_STAMP := $(TRITON_VENV)/.installed

.PHONY: quickstart demo-sft test test-all test-npu npu-venv test-triton needs-gcc lint docs clean

# the whole job on real text, on this machine, in about three minutes
quickstart: $(STAMP)
	$(BIN)/python -m modellink.quickstart

# instruction tuning on a small task, examined on items it never saw, in about a minute
demo-sft: $(STAMP)
	$(BIN)/python -m modellink.demo_sft

# lint and the default tests
test: lint
	$(PYTEST) -n 2 --dist loadfile -m "not slow and not alone"
	$(PYTEST) -m "not slow and alone"

# also the longer proofs
test-all: lint
	$(PYTEST) -n 2 --dist loadfile -m "not alone"
	$(PYTEST) -m alone

# the NPU code under the real torch_npu, on a simulated device (docs/npu.md)
test-npu: needs-gcc $(NPU_STAMP)
	LD_LIBRARY_PATH=$(CURDIR)/$(NPU_VENV)/stubs PYTHONPATH=$(CURDIR) TORCH_DEVICE_BACKEND_AUTOLOAD=0 \
		TASK_QUEUE_ENABLE=0 CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 \
		$(NPU_VENV)/bin/python -m pytest -p no:cacheprovider -n 2 --dist loadfile tests/npu

# what test-npu makes first: downloads, and stub libraries
npu-venv: needs-gcc $(NPU_STAMP)

needs-gcc:
	@command -v gcc > /dev/null || { echo "make test-npu compiles stub CANN libraries: install gcc first."; exit 1; }

# the Triton kernels of the CUDA forms, liger-kernel's and ours, interpreted on the CPU (docs/cuda.md)
test-triton: $(TRITON_STAMP)
	TRITON_INTERPRET=1 PYTHONPATH=$(CURDIR) CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 \
		$(TRITON_VENV)/bin/python -m pytest -p no:cacheprovider tests/liger

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

# regenerate the table of flags
docs: $(STAMP)
	$(BIN)/python -m modellink.config.flags_table > docs/flags.md

$(STAMP): requirements.txt setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $(STAMP)

# torch_npu breaks `import torch` where CANN is missing, so it gets an environment of its own, which borrows the
# packages of the first one and adds torch_npu, the stub libraries and the operator lists of other releases
$(NPU_STAMP): $(STAMP) tests/npu/stubs.py tests/npu/host_runtime.c tests/npu/old_schemas.py
	$(BIN)/python -m venv --clear --without-pip $(NPU_VENV)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$(echo $(NPU_VENV)/lib/python3*/site-packages)/requirements-of-modellink.pth
	$(BIN)/python -m pip --python $(NPU_VENV)/bin/python install --quiet --disable-pip-version-check --no-deps \
		"torch-npu==2.13.0"
	$(NPU_VENV)/bin/python tests/npu/stubs.py $(NPU_VENV)/stubs
	$(BIN)/python tests/npu/old_schemas.py $(NPU_VENV)/schemas
	touch $(NPU_STAMP)

# 280 MB that nothing else needs on a machine without a GPU: an environment of its own, which borrows the first one's
$(TRITON_STAMP): $(STAMP)
	$(BIN)/python -m venv --clear --without-pip $(TRITON_VENV)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$(echo $(TRITON_VENV)/lib/python3*/site-packages)/requirements-of-modellink.pth
	$(BIN)/python -m pip --python $(TRITON_VENV)/bin/python install --quiet --disable-pip-version-check --no-deps \
		"liger-kernel==0.8.5" "triton==3.9.0"
	touch $(TRITON_STAMP)

clean:
	rm -rf $(VENV) $(NPU_VENV) $(TRITON_VENV) logs quickstart demo-sft
