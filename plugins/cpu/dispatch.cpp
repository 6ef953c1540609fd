// Selects the kernels for the CPU that runs this process. QDBEV_CPU_KERNELS=plain or avx2 selects slower ones, for tests.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace {

const qdbev::Kernels& selected() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    const char* wanted = std::getenv("QDBEV_CPU_KERNELS");
    if (wanted && std::strcmp(wanted, "plain") == 0) return qdbev::plain::kernels;
    if (has_avx512 && !(wanted && std::strcmp(wanted, "avx2") == 0)) return qdbev::avx512::kernels;
    if (has_avx2) return qdbev::avx2::kernels;
#endif
    return qdbev::plain::kernels;
}

}  // namespace

const qdbev::Kernels& qdbev::kernels() {
    static const Kernels& found = selected();
    return found;
}
