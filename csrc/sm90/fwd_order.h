// The sections of heads of a forward that is causal, see order.h, or has intervals.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <vector>

#include "host/params.h"
#include "sm90/order.h"
#include "sm90/work_order.cuh"
#include "tile/mask.cuh"

namespace jax_flash::sm90 {

// How many rows of padding stand before the first row of a causal head, in whole warpgroups; the
// rest stands after the last. The first block sees the fewest keys, the last one the most, and in a
// block with fewer rows a tile of keys takes almost as long as in a full one. Where tiles are as
// long as blocks, it would only put the mask's border into two tiles instead of one.
inline int front_rows(const MhaFwdParams& params, int64_t packed_rows, int rows, int keys) {
  if (params.window_right == kUnbounded || keys >= rows) return 0;
  const int64_t padding = (packed_rows + rows - 1) / rows * rows - packed_rows;
  return static_cast<int>(padding / 64 * 64);
}

// How heads (or packs of them) are taken.
inline Sections choose_sections(const MhaFwdParams& params, int64_t head_groups, int64_t row_blocks,
                                int rows, int front, int keys, int64_t multiprocessors,
                                int64_t l2_bytes) {
  // What a block costs beside its key tiles, in tiles.
  constexpr float kBlockCost = 1.5f;
  const int64_t all = params.batch * head_groups;
  const RowMask mask = RowMask::make(params.query_length, params.key_length, params.window_left,
                                     params.window_right, params.bottom_right);
  const int64_t packed = params.heads / head_groups;
  std::vector<float> costs;
  for (int64_t block = row_blocks - 1; block >= 0; --block) {
    const int64_t first = std::max<int64_t>(0, block * rows - front);
    const int64_t past = (block + 1) * rows - front;
    const KeyInterval seen =
        mask.hull(static_cast<int>(first / packed), static_cast<int>((past + packed - 1) / packed));
    const int tiles = (seen.end + keys - 1) / keys - seen.first / keys;
    costs.push_back(seen.first < seen.end ? kBlockCost + tiles : 0.0f);
  }
  const double head_bytes = 2.0 * params.key_length * (params.head_dim + params.head_dim_v) *
                            params.kv_heads / head_groups;
  constexpr double kSpillCost = 0.02;
  // Few blocks of a head (three of 512 rows at width 64) meet their like again after some turns. A
  // turn backwards suits 16 blocks of a head, which without it would come in larger sections.
  return best_sections(all, costs, head_bytes, kSpillCost, multiprocessors, l2_bytes,
                       {section_turn(multiprocessors), 0, multiprocessors / 4, multiprocessors / 3,
                        multiprocessors - multiprocessors / 11});
}

// How many heads a section of the queue has, with intervals: as many as share the L2, but at least
// as many as give each multiprocessor some blocks. Else the longest blocks of a section, of which a
// thread block takes three before it has done the first, would be too much of it.
inline int64_t queue_section(int64_t all, int64_t group, int64_t row_blocks, double head_bytes,
                             int64_t multiprocessors, int64_t l2_bytes) {
  constexpr int64_t kBlocks = 8;
  const int64_t fit = work_section(all, group, head_bytes, l2_bytes);
  const int64_t fill = kBlocks * multiprocessors / row_blocks;
  if (fit >= fill) return fit;
  const int64_t groups = all / group;
  const int64_t sections = std::max<int64_t>(1, all / fill);
  return group * ((groups + sections - 1) / sections);
}

// `choose_sections`, remembered: the choice takes the host 50 to 300 microseconds.
inline Sections choose_sections_once(const MhaFwdParams& params, int64_t head_groups,
                                     int64_t row_blocks, int rows, int front, int keys,
                                     int64_t multiprocessors, int64_t l2_bytes) {
  using Facts = std::array<int64_t, 14>;
  const Facts facts = {params.batch,
                       params.query_length,
                       params.key_length,
                       params.heads,
                       params.kv_heads,
                       params.head_dim,
                       params.head_dim_v,
                       params.window_left,
                       params.window_right,
                       params.bottom_right,
                       head_groups,
                       rows,
                       keys,
                       multiprocessors};
  constexpr size_t kRemembered = 1024;
  thread_local std::map<Facts, Sections> chosen;
  const auto found = chosen.find(facts);
  if (found != chosen.end()) return found->second;
  if (chosen.size() == kRemembered) chosen.clear();
  const Sections sections = choose_sections(params, head_groups, row_blocks, rows, front, keys,
                                            multiprocessors, l2_bytes);
  chosen.emplace(facts, sections);
  return sections;
}

}  // namespace jax_flash::sm90
