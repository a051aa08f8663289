// AMX on a processor without it: catches the illegal instruction, does what it means, goes on behind it. For
// tests: it runs the machine code that an AMX processor would run, compiler's doing included. Instructions as
// in Intel's manual (325383), volume 2.
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>

namespace {

struct Tiles {
  uint8_t rows[8];
  uint16_t bytes[8];
  uint8_t data[8][1024];
};
__thread Tiles tiles;
struct sigaction before;
volatile long emulated = 0;

int64_t reg(const ucontext_t* c, int n) {
  static const int at[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                             REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return c->uc_mcontext.gregs[at[n]];
}

// A memory operand: its address and, where it has an index, the index (AMX's stride).
struct Operand {
  uint8_t* address;
  int64_t stride;
  int length;  // of ModRM, SIB and displacement
};

Operand operand(const ucontext_t* c, const uint8_t* code, bool extend_index, bool extend_base,
                const uint8_t* start) {
  const int mod = code[0] >> 6, rm = code[0] & 7;
  Operand o{nullptr, 0, 1};
  int64_t address = 0;
  bool displaced32 = mod == 2, relative = false;
  if (rm == 4) {
    const uint8_t sib = code[1];
    o.length = 2;
    const int index = ((sib >> 3) & 7) | extend_index << 3, base = sib & 7;
    if (base == 5 && mod == 0)
      displaced32 = true;
    else
      address = reg(c, base | extend_base << 3);
    if (index != 4) o.stride = reg(c, index) << (sib >> 6);
  } else if (rm == 5 && mod == 0) {
    displaced32 = relative = true;
  } else {
    address = reg(c, rm | extend_base << 3);
  }
  if (mod == 1) {
    address += int8_t(code[o.length]);
    o.length += 1;
  } else if (displaced32) {
    int32_t d;
    memcpy(&d, code + o.length, 4);
    address += d;
    o.length += 4;
  }
  if (relative) address += reinterpret_cast<int64_t>(start) + 4 + o.length;
  o.address = reinterpret_cast<uint8_t*>(address);
  return o;
}

float widen(uint16_t x) {
  const uint32_t u = uint32_t(x) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

void dot(int to, int left, int right) {
  for (int m = 0; m < tiles.rows[to]; ++m)
    for (int k = 0; k < tiles.bytes[left] / 4; ++k)
      for (int n = 0; n < tiles.bytes[to] / 4; ++n) {
        float sum;
        uint16_t a[2], b[2];
        memcpy(&sum, tiles.data[to] + 64 * m + 4 * n, 4);
        memcpy(a, tiles.data[left] + 64 * m + 4 * k, 4);
        memcpy(b, tiles.data[right] + 64 * k + 4 * n, 4);
        sum += widen(a[0]) * widen(b[0]) + widen(a[1]) * widen(b[1]);
        memcpy(tiles.data[to] + 64 * m + 4 * n, &sum, 4);
      }
}

// The instruction's length, 0 if it is none of AMX's.
int emulate(ucontext_t* c, const uint8_t* code) {
  if (code[0] != 0xC4 || (code[1] & 0x1F) != 2) return 0;
  const bool high_reg = !(code[1] & 0x80), high_index = !(code[1] & 0x40), high_base = !(code[1] & 0x20);
  const int prefix = code[2] & 3, opcode = code[3], third = ~(code[2] >> 3) & 15;
  const int mod = code[4] >> 6, tile = ((code[4] >> 3) & 7) | high_reg << 3, rm = code[4] & 7;
  if (opcode == 0x49 && prefix == 0 && mod != 3) {  // LDTILECFG
    const Operand o = operand(c, code + 4, high_index, high_base, code);
    for (int t = 0; t < 8; ++t) {
      memcpy(&tiles.bytes[t], o.address + 16 + 2 * t, 2);
      tiles.rows[t] = o.address[48 + t];
    }
    memset(tiles.data, 0, sizeof tiles.data);
    return o.address[0] == 1 ? 4 + o.length : 0;
  }
  if (opcode == 0x49 && prefix == 0) {  // TILERELEASE
    memset(&tiles, 0, sizeof tiles);
    return 5;
  }
  if (tile > 7 || tiles.rows[tile] == 0) return 0;  // not configured: a fault on the real thing too
  if (opcode == 0x49 && prefix == 3) {              // TILEZERO
    memset(tiles.data[tile], 0, 1024);
    return 5;
  }
  if (opcode == 0x4B && mod != 3) {  // TILELOADD (F2), TILESTORED (F3)
    const Operand o = operand(c, code + 4, high_index, high_base, code);
    for (int r = 0; r < tiles.rows[tile]; ++r) {
      uint8_t* row = tiles.data[tile] + 64 * r;
      if (prefix == 2)
        memcpy(o.address + r * o.stride, row, tiles.bytes[tile]);
      else
        memcpy(row, o.address + r * o.stride, tiles.bytes[tile]);
    }
    return 4 + o.length;
  }
  if (opcode == 0x5C && prefix == 2 && mod == 3) {  // TDPBF16PS
    dot(tile, rm, third);
    return 5;
  }
  return 0;
}

void handler(int signal, siginfo_t* info, void* context) {
  ucontext_t* c = static_cast<ucontext_t*>(context);
  greg_t& at = c->uc_mcontext.gregs[REG_RIP];
  if (const int length = emulate(c, reinterpret_cast<const uint8_t*>(at))) {
    at += length;
    emulated = emulated + 1;
    return;
  }
  sigaction(signal, &before, nullptr);  // not ours: let it fault again
  (void)info;
}

}  // namespace

extern "C" void amx_emulator_start() {
  struct sigaction action = {};
  action.sa_sigaction = handler;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGILL, &action, &before);
}
extern "C" long amx_emulator_count() { return emulated; }
