// The order in which thread blocks that stay work off the blocks of a causal problem.
//
// Heads are taken in sections. A section's ids run from the longest row blocks to the shortest and
// go round all multiprocessors, every other round in reverse, so that long and short blocks cancel
// in pairs of rounds. What does not cancel is spread by turning the multiprocessors from section to
// section. docs/design/fwd_sm90.md compares the result with a queue of the longest block first.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <vector>

#include "host/params.h"
#include "tile/mask.cuh"

namespace jax_flash::sm90 {

// By how many multiprocessors each section is turned against the one before.
inline int64_t section_turn(int64_t multiprocessors) { return multiprocessors / 10; }

// The share of the multiprocessors' time that is used if sections have `heads` of `all` heads.
// costs: of a head's row blocks, from the longest.
inline double section_use(int64_t all, int64_t heads, const std::vector<float>& costs,
                          int64_t multiprocessors) {
  // More sections than this even out as so many do.
  constexpr int64_t kSections = 16;
  const auto loads_of = [&](int64_t count) {
    std::vector<float> loads(multiprocessors, 0.0f);
    int64_t place = 0;
    int64_t step = 1;
    for (const float cost : costs) {
      for (int64_t head = 0; head < count; ++head) {
        loads[place] += cost;
        place += step;
        if (place < 0 || place == multiprocessors) {  // the next round comes back
          place -= step;
          step = -step;
        }
      }
    }
    return loads;
  };
  std::vector<float> sum(multiprocessors, 0.0f);
  std::vector<float> loads = loads_of(std::min(heads, all));
  int64_t turn = 0;
  for (int64_t section = 0, left = all; left > 0 && section < kSections; ++section) {
    if (left < heads) loads = loads_of(left);
    for (int64_t i = 0; i < multiprocessors; ++i) {
      sum[turn] += loads[i];
      if (++turn == multiprocessors) turn = 0;
    }
    turn = (turn + section_turn(multiprocessors)) % multiprocessors;
    left -= heads;
  }
  double total = 0.0;
  for (const float load : sum) total += load;
  const double longest = *std::max_element(sum.begin(), sum.end());
  return longest == 0.0 ? 1.0 : total / (multiprocessors * longest);
}

// How many heads (or packs of them) make a section: those that fill two, four, six or eight rounds,
// whichever keeps the multiprocessors busiest, with an eye on keys that the L2 cannot hold.
inline int64_t choose_section_heads(const MhaFwdParams& params, int64_t head_groups,
                                    int64_t row_blocks, int rows, int keys, int64_t multiprocessors,
                                    int64_t l2_bytes) {
  // What a block costs beside its key tiles, in tiles.
  constexpr float kBlockCost = 1.5f;
  const int64_t all = params.batch * head_groups;
  const RowMask mask = RowMask::make(params.query_length, params.key_length, params.window_left,
                                     params.window_right, params.bottom_right);
  const int64_t packed = params.heads / head_groups;
  std::vector<float> costs;
  for (int64_t block = row_blocks - 1; block >= 0; --block) {
    const KeyInterval seen =
        mask.hull(static_cast<int>(block * rows / packed),
                  static_cast<int>(((block + 1) * rows + packed - 1) / packed));
    const int tiles = (seen.end + keys - 1) / keys - seen.first / keys;
    costs.push_back(seen.first < seen.end ? kBlockCost + tiles : 0.0f);
  }
  const double head_bytes = 2.0 * params.key_length * (params.head_dim + params.head_dim_v) *
                            params.kv_heads / head_groups;
  int64_t best = 1;
  double most = -1e30;
  for (int64_t pairs = 1; pairs <= 4; ++pairs) {
    const int64_t heads =
        std::clamp<int64_t>(2 * multiprocessors * pairs / row_blocks, 1, std::max<int64_t>(1, all));
    const double spilled = std::max(0.0, heads * head_bytes / l2_bytes - 0.8);
    const double gain =
        section_use(all, heads, costs, multiprocessors) - 0.02 * spilled - 0.002 * pairs;
    if (gain > most) {
      best = heads;
      most = gain;
    }
  }
  return best;
}

// The same, remembered: the choice takes the host some ten microseconds.
inline int64_t section_heads(const MhaFwdParams& params, int64_t head_groups, int64_t row_blocks,
                             int rows, int keys, int64_t multiprocessors, int64_t l2_bytes) {
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
  thread_local std::map<Facts, int64_t> chosen;
  const auto found = chosen.find(facts);
  if (found != chosen.end()) return found->second;
  if (chosen.size() == kRemembered) chosen.clear();
  const int64_t heads =
      choose_section_heads(params, head_groups, row_blocks, rows, keys, multiprocessors, l2_bytes);
  chosen.emplace(facts, heads);
  return heads;
}

}  // namespace jax_flash::sm90
