"""Trains one model. Knows torch; knows no Hydra, MLflow, SLURM or Optuna.

data/            Token streams and tokenizers, by kind of data
methods/         How the model is parametrised and updated
evals/           Perplexity and minimal pairs
config.py        every knob: type, unit, default, bounds; rules across knobs
model.py         the complete decoder
train.py         the training loop
measures.py      when evals, dynamics and the probe of restarts are run
timing.py        how long some of its steps take
overlap.py       what host and GPU do at the same time; on a CPU at once
schedule.py      learning-rate factors and restart steps, as functions of the step
seeds.py         draws that depend on seed, step and name alone
redraws.py       when adapters are drawn anew, and which never learn
dropout.py       dropout of the adapters' inputs, alike on any device
optim.py         AdamW and Muon, clipping, and pruning of their state
loss.py          the head's loss and log-probabilities without full logits
head.py          the head's loss on a GPU, its softmax compiled
kernels.py       attention, norms, SwiGLU and the adapted linear, with their backward passes
graphs.py        compiled training passes, on a GPU
native.cpp       the same for a CPU, in C++
native.py        builds and loads `native.cpp`, where there is a compiler
native_check.py  each of its functions against float64, on every load
checkpoint.py    atomic checkpoints, and back
gpu.py           which GPU a process takes, what it cannot do, how it rounds
ranks.py         processes of one run: they meet, are compared, stay equal
shell.py         a process's place in a group, from its environment
dynamics.py      which matrices of a run are measured, and the metrics of them
spectra.py       singular values, effective rank and condition number of matrices
costs.py         parameters, FLOPs and memory from shapes
devices.py       peaks of GPUs by their names
utilisation.py   a run's FLOP/s as a share of its GPUs' peak (MFU)
events.py        what a run reports: Event and Sink
foreign.py       models of transformers, evaluated like our own
export.py        a run as a plain `LlamaForCausalLM`, and pico's or Llama's weights back
sources.py       the digest of this package's code
atomic.py        files that are never half-written
shared.py        files and folders as writable as the folder they are in
"""
