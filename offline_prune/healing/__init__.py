"""Training the weights that pruning kept, towards the logits of the dense model.

Modules: settings, models (teacher and student), text, loss, weights (what is trained), plan (memory), training,
writing, report, and pipeline, which has the order of work.
"""
