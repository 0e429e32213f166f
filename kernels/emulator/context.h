// A context is a suspended flow of control: a stack, and on it the registers that a call must preserve.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__) && !defined(__aarch64__) && !defined(EMULATOR_UCONTEXT)
#define EMULATOR_UCONTEXT 1
#endif

namespace emulator {

#ifdef EMULATOR_UCONTEXT

}  // namespace emulator
#include <ucontext.h>
namespace emulator {

struct Context {
    ucontext_t state;
};
inline void prepare(Context& context, char* stack, char* top, void (*entry)()) {
    getcontext(&context.state);
    context.state.uc_stack.ss_sp = stack;
    context.state.uc_stack.ss_size = static_cast<size_t>(top - stack);
    context.state.uc_link = nullptr;
    makecontext(&context.state, entry, 0);
}
inline void change(Context& from, Context& to) { swapcontext(&from.state, &to.state); }

#else

struct Context {
    void* stack_pointer;
};

// Pushes the preserved registers, keeps the stack pointer in *from, takes `to` and pops what lies there.
extern "C" void emulator_change(void** from, void* to) __asm__("emulator_change");

#ifdef __x86_64__
constexpr int saved_words = 6;  // rbp rbx r12 r13 r14 r15, and above them the return address
constexpr int return_word = 6;
#else
constexpr int saved_words = 20;  // x19 .. x30, d8 .. d15; x30 is the return address
constexpr int return_word = 11;
#endif

inline void prepare(Context& context, char*, char* top, void (*entry)()) {
    auto words =
        reinterpret_cast<uintptr_t*>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{15}) - 2 - saved_words;
    for (int i = 0; i < saved_words + 2; ++i) words[i] = 0;
    words[return_word] = reinterpret_cast<uintptr_t>(entry);
    context.stack_pointer = words;
}
inline void change(Context& from, Context& to) { emulator_change(&from.stack_pointer, to.stack_pointer); }

#endif

}  // namespace emulator
