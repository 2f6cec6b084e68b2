#!/usr/bin/env bash
# Runs a command as a CPU with AVX2 only would, on one that has more: benchmarks/avx2.sh make test
# torch, its compiler and swan's kernels are limited, and what they compile is kept apart.
set -euo pipefail
folder=${SWAN_AVX2_FOLDER:-${TMPDIR:-/tmp}/swan-avx2}
mkdir -p "$folder"
cat >"$folder/c++" <<'END'
#!/usr/bin/env bash
arguments=()
for argument in "$@"; do
  [ "$argument" = -march=native ] && argument=-march=x86-64-v3
  arguments+=("$argument")
done
exec c++ "${arguments[@]}"
END
chmod +x "$folder/c++"
export ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 SWAN_CPU=avx2
export TORCHINDUCTOR_CACHE_DIR=$folder/inductor TORCH_EXTENSIONS_DIR=$folder/extensions
if command -v c++ >/dev/null; then export CXX=$folder/c++; fi
exec "$@"
