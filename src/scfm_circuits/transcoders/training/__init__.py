"""Training all layers from one forward pass of the model.

Reading order: `settings` (what decides a training), `activation_buffer`, `gradients` and
`sparse_gradients`, `optimizer`, `run`; beside them `checkpoints`, `processes`, `interrupts`,
`history` and `cost`.
"""
