PYTHON ?= python3
VENV := .venv
VENV_OLDEST := .venv-transformers-5.17
VENV_SCALE := .venv-scale
TRITON_OLDEST := 'triton==3.6.*'
# Installed first and by itself, so that nothing which needs torch can pull in another build of it.
TORCH ?= torch==2.13.0

SOURCES := pyproject.toml setup.py $(wildcard csrc/*)
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
# A file of tests to each core; the tests themselves run on one thread.
SHARED := --numprocesses auto --dist loadfile
# What depends on transformers, and on Triton's compiler.
OLDEST_TESTS := tests/test_architectures.py tests/test_architectures_vision.py tests/test_dropin.py \
  tests/test_dropin_media.py tests/test_encoder_decoder.py tests/test_engine.py tests/test_exact_kv.py \
  tests/test_kernels_compile.py tests/test_media_engine.py tests/test_outputs.py tests/test_rewards_media.py \
  tests/test_text_media.py

.PHONY: demo test test-oldest test-scale sanitize soak faults bench lint docs wheel clean
.NOTPARALLEL: # all environments build the extension into the same folder

demo: $(VENV)/.ready
	@$(VENV)/bin/stars-fast demo

test: $(VENV)/.ready
	$(VENV)/bin/python -m pytest $(SHARED)

test-oldest: $(VENV_OLDEST)/.ready
	$(VENV_OLDEST)/bin/python -m pytest $(SHARED) $(OLDEST_TESTS)

# What needs Ray or the evaluation harness, which `test` skips: half a gigabyte that few want.
test-scale: $(VENV_SCALE)/.ready
	$(VENV_SCALE)/bin/python -m pytest tests/scale tests/test_integrations_lm_eval.py

# The C++ under the compiler's sanitizers: neither Python nor torch.
sanitize:
	tests/sanitize.sh cpu

soak: $(VENV)/.ready
	$(VENV)/bin/python benchmarks/soak.py --minutes $(or $(MINUTES),1)

faults: $(VENV)/.ready
	STARS_FAST_FAULTS=all $(VENV)/bin/python -m pytest --numprocesses auto tests/faults

bench: $(VENV)/.ready
	$(VENV)/bin/python -m pytest benchmarks/micro

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

# From the docstrings as they stand; nothing of the package is imported, and nothing fetched.
docs: $(VENV)/.ready
	@$(VENV)/bin/python $(PIP_INSTALL) --editable '.[docs]'
	$(VENV)/bin/python -m mkdocs build

wheel: $(VENV)/.ready
	rm -rf build dist
	$(VENV)/bin/python -m build

clean:
	rm -rf build dist site *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -f stars_fast/*.so $(VENV)/.ready $(VENV_OLDEST)/.ready $(VENV_SCALE)/.ready

# $(1): the environment's folder; $(2): further requirements; $(3): further extras, each after a comma. Run again when a
# C++ source changes.
define set_up
	@echo "setting up $(1)"
	@test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	@echo "  $(TORCH)"
	@$(1)/bin/python $(PIP_INSTALL) '$(TORCH)'
	@echo "  stars-fast and its tools: the C++ is compiled"
	@$(1)/bin/python $(PIP_INSTALL) --editable '.[dev$(3)]' $(2)
	@touch $@
endef

$(VENV)/.ready: $(SOURCES)
	$(call set_up,$(VENV))

$(VENV_OLDEST)/.ready: $(SOURCES)
	$(call set_up,$(VENV_OLDEST),'transformers==5.17.*' $(TRITON_OLDEST))

COMMA := ,
$(VENV_SCALE)/.ready: $(SOURCES)
	$(call set_up,$(VENV_SCALE),'ray[serve]',$(COMMA)ray$(COMMA)serve$(COMMA)eval-harness)
