"""How fast the kernels are on the device that is there, beside what one would use instead.

`suite.run` yields a row a measurement; `report` writes them. The command is `dllm-jax bench`.
"""
