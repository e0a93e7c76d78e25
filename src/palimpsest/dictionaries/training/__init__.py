"""Training dictionaries: weights in training layout, losses, one step, the state of a run, the loop.

`loop` is the entrance; each module imports only those named before it in `weights, losses, step, trainer, loop`
(`sparse` and `dense` are the two ways of a step, `checkpoint` is the file of a trainer).
"""
