# One environment, real files as targets. `make demo` and `make test` need Python 3.11 or 3.12 and nothing else.
#
#   make demo                    data -> training -> quantization -> ONNX -> engine -> evaluation -> table and pictures, in runs/demo
#   make test                    the tests, on the CPU
#   make data                    the synthetic world; NUSCENES=/path VERSION=v1.0-mini prepares real nuScenes instead
#   make train                   RECIPE=micro RUN=runs/micro: float teacher (or TEACHER=file), then the student, stage by stage
#   make ablation                JOBS=2: every form of training beside the others, with a table and curves; hours
#   make export-onnx pack        MODEL=runs/demo/w4a6.pt (pack: the smallest file that detects the same)
#   make engine                  MODEL=runs/demo/w4a6.onnx; BACKEND=cpu builds for the CPU of this machine
#   make audit bench             MODEL=runs/demo/w4a6.engine
#   make eval                    MODEL=runs/demo/w4a6.onnx, .pt or .engine
#   make engine-eval             MODEL=runs/demo/w4a6.engine: beside its .onnx and .pt, metric by metric, tensor by tensor
#   make gpu-check               RUN=runs/demo: all that only a GPU shows, within ten minutes, in results/<gpu>_<date>.json
#   make views                   MODEL=runs/demo/teacher.pt: what the encoder sees of one frame, as pictures
#   make sizes                   tiny, small and base with random weights: float and W8A8, ONNX, engines, what it all took
#   make audit-tiny              tiny with random weights at W8A8 and W4A6: which layer of the engines runs in which precision
#   make report                  RUN=runs/demo: one table of all evaluated models of a run
#   make setup lint clean        installs .venv; checks rules and format; removes build folders and caches
#   make cpu-cost step-cost image-cost attention-cost deform-cost kernel-bench results
#                                single measurements, and copying them to results/; docs/commands.md describes them

# Training on a CPU: threads that wait give their core away soon, and memory is kept for the next step.
export GOMP_SPINCOUNT ?= 20000
export MALLOC_TRIM_THRESHOLD_ ?= 1000000000
export MALLOC_MMAP_THRESHOLD_ ?= 33554432

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
PY := .venv/bin/python
RUN ?= runs/demo
RECIPE ?= micro
BITS ?= w4a6
WORLD ?= data/micro
NAME = $(basename $(notdir $(MODEL)))

STUDENTS := w8a8 w4a6_ptq w4a6
SIZES ?= tiny small base
DEMO_PT := $(RUN)/teacher.pt $(STUDENTS:%=$(RUN)/%.pt)
DEMO_ONNX := $(RUN)/teacher.onnx $(RUN)/w8a8.onnx $(RUN)/w4a6.onnx
DEMO_ENGINES := $(RUN)/w8a8.engine $(RUN)/w4a6.engine
DEMO_METRICS := $(patsubst $(RUN)/%.pt,$(RUN)/eval/%_pt/metrics.json,$(DEMO_PT)) \
	$(patsubst $(RUN)/%.onnx,$(RUN)/eval/%_onnx/metrics.json,$(DEMO_ONNX))

.DELETE_ON_ERROR:
.SECONDARY:
.PHONY: demo cpu-engines test data train ablation export-onnx pack engine audit bench kernel-bench gpu-check eval engine-eval report views sizes audit-tiny size-files \
	cpu-cost step-cost image-cost attention-cost deform-cost results lint setup clean

demo: $(DEMO_METRICS) $(DEMO_ENGINES) $(RUN)/pictures cpu-engines
	$(PY) -m eval.report --run $(RUN)

# Engines that run here, float beside integer. A CPU whose integer products saturate refuses to build some of them, and says so.
cpu-engines: $(DEMO_ONNX)
	for name in teacher w8a8 w4a6; do \
		if $(PY) -m engine.build --backend cpu --onnx $(RUN)/$$name.onnx --out $(RUN)/$$name.cpu.engine; then \
			$(PY) -m eval.run --model $(RUN)/$$name.cpu.engine || exit 1; \
		else echo "$$name has no engine for this CPU, for the reason above"; fi; \
	done

test: .venv/.ok
	$(PY) -m pytest

setup: .venv/.ok
.venv/.ok: requirements.txt requirements-gpu.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	if command -v nvidia-smi >/dev/null; then $(PY) -m pip uninstall --quiet -y onnxruntime && $(PY) -m pip install --quiet -r requirements-gpu.txt; fi
	$(PY) -m plugins.cpu.install
	touch $@

ifdef NUSCENES
data: .venv/.ok
	$(PY) -m qdbev.data.build_infos --root $(NUSCENES) $(if $(VERSION),--version $(VERSION))
else
data: $(WORLD)/world.json
endif

$(WORLD)/world.json: | .venv/.ok
	$(PY) -m synthetic.generate --world micro --out $(WORLD)

$(RUN)/teacher.pt: | $(WORLD)/world.json
	$(PY) -m train.teacher --recipe $(RECIPE) --run $(RUN) --set data.root=$(WORLD)

$(RUN)/w8a8.pt: $(RUN)/teacher.pt
	$(PY) -m train.qat --teacher $< --student $@ --bits w8a8
$(RUN)/w4a6_ptq.pt: $(RUN)/teacher.pt
	$(PY) -m train.qat --teacher $< --student $@ --bits w4a6 --set 'quant.stages=()'
$(RUN)/w4a6.pt: $(RUN)/teacher.pt
	$(PY) -m train.qat --teacher $< --student $@ --bits w4a6

$(RUN)/%.onnx: $(RUN)/%.pt
	$(PY) -m export.to_onnx --checkpoint $< --onnx $@
$(RUN)/%.engine: $(RUN)/%.onnx
	$(PY) -m engine.build --onnx $< --out $@

$(RUN)/eval/%_pt/metrics.json: $(RUN)/%.pt
	$(PY) -m eval.run --model $< --out $(@D)
$(RUN)/eval/%_onnx/metrics.json: $(RUN)/%.onnx
	$(PY) -m eval.run --model $< --out $(@D)
$(RUN)/pictures: $(RUN)/w4a6.pt
	$(PY) -m eval.pictures --model $< --out $@

train: TEACHER ?= $(RUN)/teacher.pt
train: .venv/.ok
	$(if $(filter $(RUN)/teacher.pt,$(TEACHER)),$(PY) -m train.teacher --recipe $(RECIPE) --run $(RUN) $(if $(PRETRAINED),--pretrained $(PRETRAINED)))
	$(PY) -m train.qat --teacher $(TEACHER) --student $(RUN)/student.pt --bits $(BITS)

# Hours; cells that are done are skipped. ROWS="vgd vgd_best" SEEDS=1 runs some, SEARCH=1 the trials of weight and temperature instead.
ablation: TEACHER ?= runs/demo/teacher.pt
ablation: .venv/.ok
	$(PY) -m bench.ablation --teacher $(TEACHER) $(if $(ROWS),--rows $(ROWS)) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(STRESS),--stress $(STRESS)) \
		$(if $(SEARCH),--search) $(if $(JOBS),--jobs $(JOBS))
	$(PY) -m bench.ablation_report --results runs/ablation/ablation.json --out runs/ablation

export-onnx: MODEL ?= $(RUN)/w4a6.pt
export-onnx: .venv/.ok
	$(PY) -m export.to_onnx --checkpoint $(MODEL) --onnx $(basename $(MODEL)).onnx

pack: MODEL ?= $(RUN)/w4a6.pt
pack: .venv/.ok
	$(PY) -m export.pack --student $(MODEL) --packed $(basename $(MODEL)).packed.pt

engine: MODEL ?= $(RUN)/w4a6.onnx
engine: .venv/.ok
	$(PY) -m engine.build --onnx $(MODEL) $(if $(BACKEND),--backend $(BACKEND) --out $(basename $(MODEL)).$(BACKEND).engine)

audit: MODEL ?= $(RUN)/w4a6.engine
audit: .venv/.ok
	$(PY) -m engine.audit --engine $(MODEL) --onnx $(basename $(MODEL)).onnx

bench: MODEL ?= $(RUN)/w4a6.engine
bench: .venv/.ok
	$(PY) -m engine.bench --engine $(MODEL)

kernel-bench: .venv/.ok
	$(PY) -m bench.kernels --out runs/kernel_bench.json

# A check that lacks something, as TensorRT, is skipped and says so.
gpu-check: .venv/.ok
	$(PY) -m bench.gpu_check --run $(RUN) --out results

eval: MODEL ?= $(RUN)/w4a6.pt
eval: .venv/.ok
	$(PY) -m eval.run --model $(MODEL) --out $(dir $(MODEL))eval/$(NAME)_$(patsubst .%,%,$(suffix $(MODEL)))

engine-eval: MODEL ?= $(RUN)/w4a6.engine
engine-eval: .venv/.ok
	$(PY) -m eval.engine_eval --model $(MODEL)

report: .venv/.ok
	$(PY) -m eval.report --run $(RUN)

views: MODEL ?= $(RUN)/teacher.pt
views: .venv/.ok
	$(PY) -m bench.views --model $(MODEL) --out $(dir $(MODEL))views

# About half an hour and 11 GB of memory on two cores, most of it for comparing base with PyTorch.
sizes: | data/street/world.json
	$(MAKE) size-files RUN=runs/sizes

size-files: $(foreach size,$(SIZES),$(RUN)/$(size).onnx $(RUN)/$(size)_w8a8.onnx $(RUN)/$(size)_w8a8.engine)
	$(PY) -m bench.sizes --run $(RUN)

# Minutes.
audit-tiny: | data/street/world.json
	$(MAKE) runs/sizes/tiny_w8a8.engine runs/sizes/tiny_w4a6.engine RUN=runs/sizes
	for bits in w8a8 w4a6; do cp runs/sizes/tiny_$$bits.engine.audit.json results/audit_tiny_$$bits.json; done

$(SIZES:%=$(RUN)/%.pt): $(RUN)/%.pt: | .venv/.ok
	$(PY) -m bench.untrained --recipe $* --teacher $@ --set data.root=data/street
$(SIZES:%=$(RUN)/%_w8a8.pt): $(RUN)/%_w8a8.pt: $(RUN)/%.pt
	$(PY) -m train.qat --teacher $< --student $@ --bits w8a8 --set quant.calibration_samples=2 --device cpu
$(RUN)/tiny_w4a6.pt: $(RUN)/tiny.pt
	$(PY) -m train.qat --teacher $< --student $@ --bits w4a6 --set 'quant.stages=()' --set quant.calibration_samples=2 --device cpu

deform-cost: | data/street/world.json
	$(MAKE) runs/sizes/small.onnx runs/sizes/small_standard.onnx RUN=runs/sizes
	$(PY) -m bench.run_cost --models runs/sizes/small.onnx runs/sizes/small_standard.onnx --out runs/sizes/deform_conv.json

$(RUN)/small_standard.onnx: $(RUN)/small.pt
	$(PY) -m export.to_onnx --checkpoint $< --onnx $@ --standard-deform-conv

data/street/world.json: | .venv/.ok
	$(PY) -m synthetic.generate --world street --scenes 1 1 --out data/street

# Every model of a run that runs on this CPU, beside each other: PyTorch, onnxruntime, engines in float and on integers.
cpu-cost: .venv/.ok
	$(PY) -m bench.run_cost --models $(RUN)/teacher.pt $(RUN)/teacher.onnx $(RUN)/w4a6.onnx $(wildcard $(RUN)/*.cpu.engine) --turns 21 \
		--out $(RUN)/cpu_cost.json

step-cost: .venv/.ok
	$(PY) -m bench.step_cost --teacher $(RUN)/teacher.pt --bits $(BITS) --out $(RUN)/step_cost.json

# Memory is the system's to give and take here: kept pages would hide a peak.
attention-cost: .venv/.ok
	env -u MALLOC_TRIM_THRESHOLD_ -u MALLOC_MMAP_THRESHOLD_ $(PY) -m bench.attention_cost --out $(RUN)/attention.json

image-cost: data/street/world.json
	$(PY) -m bench.image_cost --root data/street --out $(RUN)/image_cost.json

# Keeps what was measured.
results:
	keep() { [ ! -f "$$1" ] || cp "$$1" "results/$$2"; }; \
	keep $(RUN)/summary.json demo_micro_cpu.json; \
	keep $(RUN)/w8a8.engine.audit.json audit_micro_w8a8.json; \
	keep $(RUN)/w4a6.engine.audit.json audit_micro_w4a6.json; \
	keep $(RUN)/step_cost.json step_cost_micro_cpu.json; \
	keep $(RUN)/cpu_cost.json cpu_engine_micro.json; \
	keep runs/ablation/ablation.json ablation_micro.json; \
	keep runs/ablation/curves.png ablation_curves.png; \
	keep $(RUN)/image_cost.json image_cost_cpu.json; \
	keep $(RUN)/attention.json attention_cpu.json; \
	keep runs/kernel_bench.json kernel_bench.json; \
	keep runs/sizes/sizes.json sizes_cpu.json; \
	keep runs/sizes/deform_conv.json deform_conv_cpu.json

lint: .venv/.ok
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:
	rm -rf build .pytest_cache .ruff_cache
