"""Virtual time over the same policy objects as the runtime's: no policy is copied here.

What there is: clock (events in order of time), planner (divisions of memory, each worked out once),
calibration (what a machine takes, beside its profile), runs (what a run takes), enclave (carries
out one scheduler's commands), server (an enclave with its requests, which may be lost), network (a
star of links), arrivals (load), options (how a cluster is run, and what goes wrong), cluster (a
balancer or several over servers), metrics (what came of it), replay (a recorded real scheduler's
events once more).

The determinism contract: the same arguments and seed give the same events in the same order, on any
machine with the same floating-point arithmetic, whatever the environment and the hash seed. So
there is no clock but the virtual one, no random number but from a generator that was passed in or
made from a seed that was, no thread, and nothing whose order depends on hashes or addresses:
whatever is gone through is a list, a dict or an array, never a set. ``tests/test_architecture.py``
bans what can be told from the source; ``tests/sim/test_sim_determinism.py`` compares whole event
logs under different hash seeds.
"""
