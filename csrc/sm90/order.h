// The order in which thread blocks that stay work off unequal blocks.
//
// Heads are taken in sections. A section's ids run from the longest blocks to the shortest and
// go round all multiprocessors, every other round in reverse, so that long and short blocks cancel
// in pairs of rounds. What does not cancel is spread by turning the multiprocessors from section to
// section. docs/design/fwd_sm90.md compares the result with a queue of the longest block first.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <vector>

namespace jax_flash::sm90 {

// How heads are taken.
struct Sections {
  int64_t heads;  // of a section
  int64_t turn;   // by how many multiprocessors each is turned against the one before
};

// The turn that suits most.
inline int64_t section_turn(int64_t multiprocessors) { return multiprocessors / 10; }

// The share of the multiprocessors' time that is used if `all` heads are taken like that. costs: of
// a head's blocks, from the first.
inline double section_use(int64_t all, const Sections& sections, const std::vector<float>& costs,
                          int64_t multiprocessors) {
  const int64_t heads = sections.heads;
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
    turn = (turn + sections.turn) % multiprocessors;
    left -= heads;
  }
  double total = 0.0;
  for (const float load : sum) total += load;
  const double longest = *std::max_element(sum.begin(), sum.end());
  return longest == 0.0 ? 1.0 : total / (multiprocessors * longest);
}

// How many of `all` heads make a section: as many as fill two, four, six or eight rounds, whichever
// keeps the multiprocessors busiest, with an eye on keys (or queries) that the L2 cannot hold:
// spill_cost is the share of the time that is lost with each more L2 full of them. And which of
// `turns`; one of the later ones has to be better by a margin.
inline Sections best_sections(int64_t all, const std::vector<float>& costs, double head_bytes,
                              double spill_cost, int64_t multiprocessors, int64_t l2_bytes,
                              std::initializer_list<int64_t> turns) {
  const int64_t blocks = static_cast<int64_t>(costs.size());
  Sections best{1, 0};
  double most = -1e30;
  for (int64_t pairs = 1; pairs <= 4; ++pairs) {
    const int64_t heads =
        std::clamp<int64_t>(2 * multiprocessors * pairs / blocks, 1, std::max<int64_t>(1, all));
    const double spilled = std::max(0.0, heads * head_bytes / l2_bytes - 0.8);
    for (const int64_t turn : turns) {
      const double gain = section_use(all, {heads, turn}, costs, multiprocessors) -
                          spill_cost * spilled - 0.002 * pairs -
                          (turn == *turns.begin() ? 0.0 : 0.002);
      if (gain > most) {
        best = {heads, turn};
        most = gain;
      }
    }
  }
  return best;
}

}  // namespace jax_flash::sm90
