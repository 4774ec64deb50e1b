#include "norm_linear.h"

#include "gemm.h"
#include "token_rows.h"

namespace gac_fast {
namespace GAC_FAST_ISA {
namespace {

template <typename T>
void forward_tile(const NormLinearForward& f, const T* packed, const float* bias, std::int64_t first) {
    const NormLinearMap& map = f.map;
    const std::int64_t rows = min_of(kNormLinearTile, f.n_tokens - first);
    const std::int64_t ld = padded(map.n_in);
    const std::int64_t ldy = padded(map.n_out);
    Arena arena;
    float *x = nullptr, *y = nullptr, *rstd = nullptr;
    T* space = nullptr;
    for (int pass = 0; pass < 2; ++pass) {
        x = arena.take<float>(rows * ld);
        y = arena.take<float>(rows * ldy);
        rstd = arena.take<float>(rows);
        space = arena.take<T>(rows * ld);
        if (pass == 0) arena = Arena(arena.used());
    }
    const T* in;
    std::int64_t ldx = ld;
    const auto read = [&](const auto* from, T* to) {
        if (map.has_norm) {
            copy_rows(rows, map.n_in, from, f.x_stride, x, ld);
            normalise<T>(rows, map.n_in, nullptr, x, ld, to, ld, f.rstd != nullptr ? f.rstd + first : rstd, 1);
        } else {
            copy_rows(rows, map.n_in, from, f.x_stride, to, ld);
        }
        return to;
    };
    T* to = f.operand != nullptr ? at<T>(f.operand, first * ld) : space;
    if (!f.x_is_operand) {
        in = read(at<float>(f.x, first * f.x_stride), to);
    } else if (map.has_norm) {
        in = read(at<T>(f.x, first * f.x_stride), to);
    } else {
        in = operand(rows, map.n_in, at<T>(f.x, first * f.x_stride), f.x_stride, space, &ldx);
    }
    const TileScope tiles;
    if (f.residual != nullptr) {
        gemm<T>(rows, map.n_out, map.n_in, in, ldx, packed, y, ldy, Begin::kBias, bias);
        for (std::int64_t r = 0; r < rows; ++r) {
            const float* residual = f.residual + (first + r) * f.residual_stride;
            float* sum = at<float>(f.y, (first + r) * map.n_out);
            for_vectors(map.n_out, [&](auto get, auto put) { put(sum, get(y + r * ldy) + get(residual)); });
        }
        return;
    }
    T* out = at<T>(f.y, first * map.n_out);
    if constexpr (kIsFloat<T>) {
        if (map.n_out % kColumns == 0) {
            gemm<T>(rows, map.n_out, map.n_in, in, ldx, packed, out, map.n_out, Begin::kBias, bias);
            return;
        }
    }
    gemm<T>(rows, map.n_out, map.n_in, in, ldx, packed, y, ldy, kMapBegin<T>, bias);
    finish_rows(rows, map.n_out, y, ldy, bias, out, map.n_out, false);
}

template <typename T>
void backward_tile(const NormLinearBackward& f, const T* packed, std::int64_t tile) {
    const NormLinearMap& map = f.map;
    const std::int64_t first = tile * kNormLinearTile;
    const std::int64_t rows = min_of(kNormLinearTile, f.n_tokens - first);
    const std::int64_t ld = padded(map.n_in);
    const T* dy = at<T>(f.dy, first * f.dy_stride);
    std::int64_t dy_stride = f.dy_stride;
    if (f.dy_operand != nullptr) {
        T* to = at<T>(f.dy_operand, first * map.n_out);
        for (std::int64_t r = 0; r < rows; ++r) {
            convert(at<float>(f.dy, (first + r) * f.dy_stride), map.n_out, to + r * map.n_out);
        }
        dy = to;
        dy_stride = map.n_out;
    }
    if (f.dbias != nullptr) sum_columns(rows, map.n_out, dy, dy_stride, f.dbias_partials + tile * map.n_out);
    if (f.dx == nullptr) return;
    const std::int64_t ldy = padded(map.n_out);
    Arena arena;
    float *g = nullptr, *dx = nullptr;
    T *space = nullptr, *out_space = nullptr;
    for (int pass = 0; pass < 2; ++pass) {
        g = arena.take<float>(rows * ld);
        dx = arena.take<float>(rows * ld);
        out_space = arena.take<T>(rows * ld);
        space = arena.take<T>(rows * ldy);
        if (pass == 0) arena = Arena(arena.used());
    }
    const TileScope tiles;
    std::int64_t ld_dy;
    const T* dy_operand = operand(rows, map.n_out, dy, dy_stride, space, &ld_dy);
    gemm<T>(rows, map.n_in, map.n_out, dy_operand, ld_dy, packed, g, ld, Begin::kZero);
    if (map.has_norm) {
        if (f.dx_start != nullptr) {
            copy_rows(rows, map.n_in, f.dx_start + first * map.n_in, map.n_in, dx, ld);
        } else {
            std::memset(dx, 0, static_cast<std::size_t>(rows * ld) * sizeof(float));
        }
        add_norm_gradient(rows, map.n_in, g, ld, at<T>(f.operand, first * ld), ld, f.rstd + first, 1, dx, ld, out_space,
                          ld);
        g = dx;
    } else if (f.dx_start != nullptr) {
        for (std::int64_t r = 0; r < rows; ++r) {
            const float* start = f.dx_start + (first + r) * map.n_in;
            for_vectors(map.n_in, [&](auto get, auto put) { put(g + r * ld, get(g + r * ld) + get(start)); });
        }
    }
    for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t to = (first + r) * map.n_in;
        if (f.dx_is_operand) {
            convert(g + r * ld, map.n_in, at<T>(f.dx, to));
        } else {
            convert(g + r * ld, map.n_in, at<float>(f.dx, to));
        }
    }
}

std::int64_t n_tiles(std::int64_t n_tokens) { return (n_tokens + kNormLinearTile - 1) / kNormLinearTile; }

template <typename T>
void run(const NormLinearForward& f) {
    const NormLinearMap& map = f.map;
    auto* bias = static_cast<float*>(f.packed);
    auto* packed = reinterpret_cast<T*>(bias + padded(map.n_out));
    copy_rows(1, map.n_out, map.bias, map.n_out, bias, map.n_out);
    pack<T>(map.weight, map.weight_stride, 1, map.n_out, map.n_in, packed);
    parallel_for(n_tiles(f.n_tokens), f.n_threads,
                 [&](std::int64_t i) { forward_tile<T>(f, packed, bias, i * kNormLinearTile); });
}

template <typename T>
void run(const NormLinearBackward& f) {
    const NormLinearMap& map = f.map;
    auto* packed = static_cast<T*>(f.packed);
    if (f.dx != nullptr) pack<T>(map.weight, 1, map.weight_stride, map.n_in, map.n_out, packed);
    const std::int64_t n = n_tiles(f.n_tokens);
    parallel_for(n, f.n_threads, [&](std::int64_t i) { backward_tile<T>(f, packed, i); });
    if (f.dbias != nullptr) sum_partials(f.dbias_partials, 0, n, map.n_out, map.n_out, f.dbias);
}

}  // namespace

std::size_t norm_linear_bytes(const NormLinearMap& map) {
    const auto size = [&](std::int64_t n_out, std::int64_t n_in) {
        return map.bf16 ? packed_size<Bf16>(n_out, n_in) * 2 : packed_size<float>(n_out, n_in) * 4;
    };
    const std::int64_t forward = padded(map.n_out) * 4 + size(map.n_out, map.n_in);
    return static_cast<std::size_t>(max_of(forward, size(map.n_in, map.n_out)));
}

void norm_linear(const NormLinearForward& args) {
    if (args.map.bf16) {
        run<Bf16>(args);
    } else {
        run<float>(args);
    }
}

void norm_linear_backward(const NormLinearBackward& args) {
    if (args.map.bf16) {
        run<Bf16>(args);
    } else {
        run<float>(args);
    }
}

}  // namespace GAC_FAST_ISA
}  // namespace gac_fast
