"""What the phases' processes are forked from has imported: torch and the audit, and no model.

Owns: that import. Must not know: targets, phases' results. Measured on 2 cores: torch 1.5 s, ten processes
an audit; forked from here one begins in 0.05 s. A fork is safe as long as no thread holds anything: torch
computes with one thread here, so OpenMP never starts its own, and OpenBLAS, which starts one when numpy is
imported, looks after forks itself (pthread_atfork). CUDA is not initialised; phases on a GPU are spawned.
"""

try:
    from deployments.audit import instances, overlaps, phases  # noqa: F401

    instances.begin()
except Exception:  # whoever imports it next raises it again, where it can be told
    pass
