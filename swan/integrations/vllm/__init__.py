"""A plugin of vLLM: packed pages instead of dense ones, on its scheduler, prefix cache and parallelism.

vLLM finds it by itself where both are installed (`plugin.py`); it is used where a server is started with
`--attention-backend CUSTOM` and `--additional-config '{"swan": {"calibration": PATH, "retention": 0.26}}'`
(`swan serve MODEL` prints the command).

| file | what is there |
|---|---|
| `plugin.py`, `backend.py` | what vLLM calls: the only files that import it |
| `settings.py`, `model.py`, `layer.py` | what is served, and what is refused |
| `pages.py`, `attention.py` | pages of packed and of dense tokens, and attention over them |
| `capacity.py`, `command.py` | what fits into a memory, and how a server is started |
"""
