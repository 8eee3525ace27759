"""Training all layers from one forward pass of the model.

Reading order: `settings` (what decides a training), `activation_buffer`, `gradients`, its faster
ways (`sparse_gradients` on a CPU, `gpu_gradients` and `gpu_entries` on a GPU), `optimizer`, `run`;
beside them `checkpoints`, `processes`, `interrupts`, `history` and `cost`.
"""
