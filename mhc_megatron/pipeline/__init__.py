"""How streams cross the boundary between two pipeline stages: `state` says which way, `communicator` does it.

wide: ``x' = H_res @ x + outer(H_post, y)``, one tensor of n*C values a token, the schedule's own, over links of ours (`links`)
or in Megatron's transfers.
split: ``H_res @ x`` (n*C) leaves before the chunk's last sublayer runs, y and H_post (C and a few columns) in the schedule's
own transfers after it; the receiver adds them up (`split`; which transfers: `passes`; when they leave: `side_channel`).
"""
