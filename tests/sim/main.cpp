#include <stdlib.h>

#include "check.h"

int main(int count, char** argument) {
  if (count < 3) {
    for (const auto& test : tests()) puts(test.first.c_str());
    return 0;
  }
#ifndef __CUDACC__
  saccade::sim::block.random = strtoull(argument[2], nullptr, 10) * 2 + 1;
#endif
  try {
    tests().at(argument[1])();
  } catch (const std::exception& e) {
    printf("%s\n", e.what());
    return 1;
  }
}
