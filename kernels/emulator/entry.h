// What a kernel's library tells of its kernel: how to call it, and what it takes.
#pragma once

#include "emulator.h"

extern "C" void* emulator_dynamic_shared();  // where this thread's extern __shared__ memory lies

namespace emulator {

struct Parameter {
    char kind;  // p pointer; b bool, i int, u unsigned, f float, s struct
    char item;  // of what a pointer points to: the same letters, h half, w bfloat16, v any bytes
    char constant;
    int32_t bytes, item_bytes;
};

struct Entry {
    void (*invoke)(void** arguments);
    void* (*dynamic_shared)();
    int32_t count;
    Parameter parameters[64];
};

template <class T>
constexpr char kind_of() {
    using U = std::remove_cv_t<T>;
    if (std::is_pointer<U>::value) return 'p';
    if (std::is_same<U, bool>::value) return 'b';
    if (std::is_same<U, __half>::value) return 'h';
    if (std::is_same<U, __nv_bfloat16>::value) return 'w';
    if (std::is_void<U>::value || std::is_same<U, char>::value || std::is_same<U, unsigned char>::value)
        return 'v';
    if (std::is_integral<U>::value || std::is_enum<U>::value) return std::is_unsigned<U>::value ? 'u' : 'i';
    return std::is_floating_point<U>::value ? 'f' : 's';
}

template <class T>
constexpr Parameter parameter() {
    using Item = std::remove_pointer_t<T>;
    using Sized = std::conditional_t<std::is_void<Item>::value, char, Item>;
    return {kind_of<T>(), kind_of<Item>(), std::is_const<Item>::value, sizeof(T), sizeof(Sized)};
}

template <auto kernel>
struct Call;

template <class... Arguments, void (*kernel)(Arguments...)>
struct Call<kernel> {
    template <size_t... i>
    __attribute__((no_sanitize("thread"))) static void spread(void** arguments, std::index_sequence<i...>) {
        kernel(*static_cast<std::remove_reference_t<Arguments>*>(arguments[i])...);
    }
    __attribute__((no_sanitize("thread"))) static void invoke(void** arguments) {
        spread(arguments, std::index_sequence_for<Arguments...>());
    }
    static constexpr Entry entry(void* (*dynamic_shared)()) {
        static_assert(sizeof...(Arguments) <= 64, "a kernel takes at most 64 parameters here");
        return {invoke, dynamic_shared, sizeof...(Arguments), {parameter<Arguments>()...}};
    }
};

}  // namespace emulator
