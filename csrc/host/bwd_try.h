// TEMPORARY: choices of the sm_90 backward that a GPU has yet to compare.
#pragma once

#include <cstdlib>
#include <string>

namespace jax_flash {

// Whether `name` is in JAX_FLASH_BWD_TRY, a list with commas that is read once.
inline bool bwd_tries(const std::string& name) {
  static const std::string names = [] {
    const char* const value = std::getenv("JAX_FLASH_BWD_TRY");
    return "," + std::string(value == nullptr ? "" : value) + ",";
  }();
  return names.find("," + name + ",") != std::string::npos;
}

}  // namespace jax_flash
