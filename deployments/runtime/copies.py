"""A second instance whose weights are the first's: what a pool of copies is made of.

Owns: which tensors copies share. Must not know: who uses a copy when, audits. Parameters are shared, since
a model that writes to its parameters while it serves is shown unsafe by the audit; buffers and Python state
stay the copy's own.
"""

from typing import Any

import torch

from deployments.runtime.modules import modules_of


def tie_parameters(copy: Any, first: Any) -> int:
    """Give `copy` the parameters of `first` and the values of its buffers; the bytes that are shared now.

    Modules are matched by where the instances hold them; one without a match keeps what it has.
    """
    firsts = dict(modules_of(first))
    shared = 0
    with torch.no_grad():
        for name, module in modules_of(copy):
            twin = firsts.get(name)
            if twin is None or type(twin) is not type(module) or isinstance(module, torch.jit.ScriptModule):
                continue
            for key, parameter in twin._parameters.items():
                own = module._parameters.get(key)
                if parameter is not None and own is not None and own.shape == parameter.shape:
                    module._parameters[key] = parameter
                    shared += parameter.numel() * parameter.element_size()
            for key, buffer in twin._buffers.items():
                own_buffer = module._buffers.get(key)
                if buffer is not None and own_buffer is not None and own_buffer.shape == buffer.shape:
                    module._buffers[key] = buffer.clone()
    return shared
