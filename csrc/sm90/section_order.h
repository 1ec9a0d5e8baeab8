// Which block of which head has which id, and which ids a thread block that stays works off.
//
// Sections of heads follow each other, the last one being smaller; inside a section the block is
// the slow index. order.h says how many heads a section should have.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "host/params.h"

namespace jax_flash::sm90 {

struct SectionOrder {
  int32_t ids;
  int32_t blocks;  // of a head
  int32_t whole_sections;
  int32_t turn;   // how far the thread blocks are turned from section to section
  bool reverses;  // whether every other round goes the other way
  FastDivisor section_ids;
  FastDivisor section_heads;
  FastDivisor last_heads;  // of the smaller last section

  // False: there are too many ids. `multiple`: what the ids of a section are padded to.
  static bool make(int64_t heads, int64_t section, int64_t blocks, int64_t multiple, int64_t turn,
                   SectionOrder* order) {
    const int64_t section_ids = (section * blocks + multiple - 1) / multiple * multiple;
    const int64_t ids = heads / section * section_ids + heads % section * blocks;
    if (ids > std::numeric_limits<int32_t>::max() / 8) return false;
    order->ids = static_cast<int32_t>(ids);
    order->blocks = static_cast<int32_t>(blocks);
    order->whole_sections = static_cast<int32_t>(heads / section);
    order->turn = static_cast<int32_t>(turn);
    order->reverses = true;
    order->section_ids = FastDivisor::make(static_cast<uint32_t>(section_ids));
    order->section_heads = FastDivisor::make(static_cast<uint32_t>(section));
    order->last_heads =
        FastDivisor::make(static_cast<uint32_t>(std::max<int64_t>(1, heads % section)));
    return true;
  }

#if defined(__CUDACC__)
  // The id of thread block `group` of `groups` in a round: each round has one for each. May be past
  // the last.
  __device__ __forceinline__ int id_of(int round, int group, int groups) const {
    // A section that is turned starts a round.
    const int place = (group + section_ids.divide(round * groups) * turn) % groups;
    return round * groups + (!reverses || round % 2 == 0 ? place : groups - 1 - place);
  }

  // The block of an id in its head, and the head; the block is past the last where a section is
  // padded.
  struct Place {
    int block;
    int head;
  };
  __device__ __forceinline__ Place place_of(int id) const {
    const int section = section_ids.divide(id);
    const int in_section = id - section * static_cast<int>(section_ids.divisor);
    const FastDivisor& heads = section < whole_sections ? section_heads : last_heads;
    const int block = heads.divide(in_section);
    return {block, section * static_cast<int>(section_heads.divisor) + in_section -
                       block * static_cast<int>(heads.divisor)};
  }

  // The same where each head has `count` blocks, at most `blocks`, which the host does not know.
  __device__ __forceinline__ int ids_of(int count) const { return ids / blocks * count; }
  __device__ __forceinline__ Place place_of(int id, int count) const {
    const int heads = static_cast<int>(section_heads.divisor);
    const int section = id / (heads * count);
    const int in_section = id - section * heads * count;
    const FastDivisor& divisor = section < whole_sections ? section_heads : last_heads;
    const int block = divisor.divide(in_section);
    return {block, section * heads + in_section - block * static_cast<int>(divisor.divisor)};
  }
#endif
};

}  // namespace jax_flash::sm90
