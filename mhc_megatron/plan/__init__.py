"""What a run will need before its GPUs are asked for: memory, traffic and time of a model under a layout.

`run` is what is planned; `parameters`, `operations`, `activations` and `memory` count bytes a rank holds, `traffic` those
it moves, `schedule` plays the pipeline, `report` puts it together and `command` prints it.
"""
