#include "second_moment.h"

#include "../threads.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <memory>

namespace quantlab::quantizers {

namespace {

// U of A = U^T U in place of the upper triangle of `matrix`, [count][count]; whether A is positive definite. Every
// element's sum runs in ascending order of rows, so that the bits do not depend on how the work is cut up.
class CholeskyFactor {
public:
    CholeskyFactor(const QuantizerKernel& kernel, double* matrix, std::int64_t count, int threads)
        : kernel_(kernel), matrix_(matrix), count_(count), threads_(threads),
          copy_(static_cast<std::size_t>(panel_rows * count)) {}

    bool run() {
        for (std::int64_t first = 0; first < count_; first += panel_rows) {
            const std::int64_t rows = std::min(panel_rows, count_ - first);
            if (!factor_triangle(first, rows)) {
                return false;
            }
            finish_panel(first, rows);
            subtract_panel(first, rows);
        }
        return true;
    }

private:
    double* at(std::int64_t row, std::int64_t column) const { return matrix_ + row * count_ + column; }
    // A finished panel's eight columns, [rows][8].
    double* copy_of(std::int64_t column) { return copy_.data() + column / double_lanes * panel_rows * double_lanes; }

    bool factor_triangle(std::int64_t first, std::int64_t rows) {
        for (std::int64_t k = first; k < first + rows; ++k) {
            double* row = at(k, 0);
            if (!(row[k] > 0.0) || !std::isfinite(row[k])) {
                return false;
            }
            row[k] = std::sqrt(row[k]);
            for (std::int64_t i = k + 1; i < first + rows; ++i) {
                row[i] /= row[k];
            }
            for (std::int64_t r = k + 1; r < first + rows; ++r) {
                for (std::int64_t i = r; i < first + rows; ++i) {
                    *at(r, i) = std::fma(-row[r], row[i], *at(r, i));
                }
            }
        }
        return true;
    }

    void finish_panel(std::int64_t first, std::int64_t rows) {
        const std::int64_t start = first + rows, tiles = (count_ - start) / double_lanes;
        const auto parts = static_cast<int>(std::min<std::int64_t>(tiles, 8L * threads_));
        for_each_part(tiles, parts, threads_, [&](int, std::int64_t from, std::int64_t to) {
            for (std::int64_t tile = from; tile < to; ++tile) {
                const std::int64_t column = start + tile * double_lanes;
                kernel_.finish_columns(at(first, first), count_, rows, at(first, column), copy_of(column));
            }
        });
    }

    void subtract_panel(std::int64_t first, std::int64_t rows) {
        const std::int64_t start = first + rows, tiles = (count_ - start) / double_lanes;
        for_each_part(tiles, static_cast<int>(tiles), threads_, [&](int, std::int64_t from, std::int64_t to) {
            for (std::int64_t row = start + from * double_lanes; row < start + to * double_lanes; row += tile_rows) {
                const double* left = copy_of(row) + row % double_lanes;
                for (std::int64_t column = row / double_lanes * double_lanes; column < count_;
                     column += double_lanes) {
                    kernel_.subtract_tile(left, copy_of(column), rows, at(row, column), count_);
                }
            }
        });
    }

    const QuantizerKernel& kernel_;
    double* matrix_;
    std::int64_t count_;
    int threads_;
    std::vector<double> copy_;
};

// R, upper triangular with tile = R R^T, from the last column to the first; false where there is none.
bool factor_tile(const float* tile, double (&factor)[block_columns][block_columns]) {
    for (int j = block_columns; j-- > 0;) {
        for (int i = j + 1; i-- > 0;) {
            double rest = tile[i * block_columns + j];
            for (int k = j + 1; k < block_columns; ++k) {
                rest -= factor[i][k] * factor[j][k];
            }
            if (i == j && !(rest > 0.0)) {
                return false;
            }
            factor[i][j] = i == j ? std::sqrt(rest) : rest / factor[j][j];
        }
    }
    return true;
}

// tile^-1 = R^-T R^-1, one column of it for each unit vector.
void invert(const double (&factor)[block_columns][block_columns], float* inverse) {
    for (int column = 0; column < block_columns; ++column) {
        double solution[block_columns] = {};
        solution[column] = 1.0;
        for (int i = block_columns; i-- > 0;) {
            for (int k = i + 1; k < block_columns; ++k) {
                solution[i] -= factor[i][k] * solution[k];
            }
            solution[i] /= factor[i][i];
        }
        for (int i = 0; i < block_columns; ++i) {
            for (int k = 0; k < i; ++k) {
                solution[i] -= factor[k][i] * solution[k];
            }
            solution[i] /= factor[i][i];
        }
        for (int i = 0; i < block_columns; ++i) {
            inverse[i * block_columns + column] = static_cast<float>(solution[i]);
        }
    }
}

}  // namespace

BlockFactor factor_block(const float* tile) {
    BlockFactor result = {};
    double factor[block_columns][block_columns] = {};
    result.exists = factor_tile(tile, factor);
    if (!result.exists) {
        return result;
    }
    invert(factor, result.inverse);
    for (int j = 0; j < block_columns; ++j) {
        result.pivots[j] = static_cast<float>(factor[j][j] * factor[j][j]);
        for (int i = 0; i <= j; ++i) {
            result.factors[i * block_columns + j] = static_cast<float>(factor[i][j] / factor[j][j]);
        }
    }
    return result;
}

SecondMoment::SecondMoment(MomentView moment, float damping, int threads)
    : columns_(moment.columns), panels_(static_cast<std::size_t>(columns_ * columns_)),
      sums_(static_cast<std::size_t>(blocks() * columns_)), factors_(static_cast<std::size_t>(blocks())) {
    for_each_part(blocks(), static_cast<int>(blocks()), threads, [&](int, std::int64_t first, std::int64_t last) {
        for (std::int64_t block = first; block < last; ++block) {
            float* panel = panels_.data() + block * columns_ * block_columns;
            for (std::int64_t row = 0; row < columns_; ++row) {
                const float* source = moment.values + row * columns_ + block * block_columns;
                float* target = panel + row * block_columns;
                std::copy_n(source, block_columns, target);
                if (row / block_columns == block) {
                    target[row % block_columns] += damping;
                }
                float sum = 0.0f;
                for (int j = 0; j < block_columns; ++j) {
                    sum += target[j];
                }
                sums_[static_cast<std::size_t>(block * columns_ + row)] = sum;
            }
            factors_[static_cast<std::size_t>(block)] = factor_block(tile(block, block));
        }
    });
}

std::optional<FeedbackFactor> FeedbackFactor::of(const QuantizerKernel& kernel, MomentView moment, double damping,
                                                 const std::int32_t* order, int threads) {
    const std::int64_t n = moment.columns, blocks = n / block_columns;
    // The lower triangle of the reversed matrix's factor is the upper one that is wanted: element (a, b) here is that
    // of the columns processed a-th and b-th from the end. Not initialized: every element is written below.
    const std::unique_ptr<double[]> matrix(new double[static_cast<std::size_t>(n * n)]);
    for_each_part(n, static_cast<int>(blocks), threads, [&](int, std::int64_t first, std::int64_t last) {
        for (std::int64_t a = first; a < last; ++a) {
            const float* row = moment.values + order[n - 1 - a] * n;
            for (std::int64_t b = 0; b < n; ++b) {
                matrix[a * n + b] = row[order[n - 1 - b]];
            }
            matrix[a * n + a] += damping;
        }
    });
    if (!CholeskyFactor(kernel, matrix.get(), n, threads).run()) {
        return std::nullopt;
    }
    FeedbackFactor factor;
    factor.order_.assign(order, order + n);
    factor.pivots_.resize(static_cast<std::size_t>(n));
    factor.panels_.resize(static_cast<std::size_t>(panel_place(blocks)));
    for_each_part(blocks, static_cast<int>(blocks), threads, [&](int, std::int64_t first, std::int64_t last) {
        for (std::int64_t j = first * block_columns; j < last * block_columns; ++j) {
            const double* row = matrix.get() + (n - 1 - j) * n;
            const double pivot = row[n - 1 - j];
            float* panel = factor.panels_.data() + panel_place(j / block_columns) + j % block_columns;
            factor.pivots_[static_cast<std::size_t>(j)] = static_cast<float>(pivot * pivot);
            for (std::int64_t i = 0; i <= j; ++i) {
                panel[i * block_columns] = static_cast<float>(row[n - 1 - i] / pivot);
            }
        }
    });
    return factor;
}

}  // namespace quantlab::quantizers
