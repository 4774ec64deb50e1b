#include "philox_normal.h"

#include "philox_normal_simd.h"

namespace gac_fast {
namespace GAC_FAST_ISA {
namespace {

// Elements of one task: enough to be worth a thread, few enough that one long row serves several.
constexpr std::int64_t kTaskElements = 4096;

// make(plan, step, first element, n, out), where n is at most `block` and out has room for whole batches.
template <typename T, typename Make>
void fill(const Philox<T>& args, Make make) {
    const std::int64_t width = max_of(1, min_of(args.columns, kTaskElements));
    const std::int64_t per_row = (args.columns + width - 1) / width;
    const std::int64_t rows_per_task = max_of(1, kTaskElements / width);
    const std::int64_t row_groups = (args.rows + rows_per_task - 1) / rows_per_task;
    parallel_for(row_groups * per_row, args.n_threads, [&](std::int64_t task) {
        const std::int64_t first = task % per_row * width;
        const std::int64_t n = min_of(width, args.columns - first);
        const std::int64_t whole = n / philox::kBatch * philox::kBatch;
        const std::int64_t begin = task / per_row * rows_per_task;
        for (std::int64_t p = begin; p < min_of(begin + rows_per_task, args.rows); ++p) {
            const auto plan = static_cast<std::uint32_t>(args.plans[p * args.plan_stride]);
            const auto step = static_cast<std::uint32_t>(args.steps[p * args.step_stride]);
            T* out = args.out + p * args.out_stride + first;
            make(plan, step, first, whole, out);
            if (whole == n) continue;
            T rest[philox::kBatch];
            make(plan, step, first + whole, n - whole, rest);
            std::memcpy(out + whole, rest, static_cast<std::size_t>(n - whole) * sizeof(T));
        }
    });
}

}  // namespace

void philox_normal(const Philox<float>& args) {
    fill(args, [&](std::uint32_t plan, std::uint32_t step, std::int64_t first, std::int64_t n, float* out) {
        philox::normals(args.seed0, args.seed1, plan, step, first, n, out);
    });
}

void philox_words(const Philox<std::int64_t>& args) {
    fill(args, [&](std::uint32_t plan, std::uint32_t step, std::int64_t first, std::int64_t n, std::int64_t* out) {
        for (std::int64_t i = 0; i < n; i += philox::kBatch) {
            const auto words =
                philox::words(args.seed0, args.seed1, plan, step, static_cast<std::uint32_t>((first + i) / 4));
            for (int k = 0; k < philox::kBatch; ++k) out[i + k] = static_cast<std::int64_t>(words.w[k % 4][k / 4]);
        }
    });
}

}  // namespace GAC_FAST_ISA
}  // namespace gac_fast
