// How an emulated kernel is called: as cuLaunchKernel would be told to.
#pragma once
#include <utility>

// Call a kernel with arguments of its types, whose addresses are given
template <class... Given, std::size_t... I>
void call(void (*kernel)(Given...), void** given, std::index_sequence<I...>) {
    kernel(*(Given*)given[I]...);
}
template <class... Given>
void call(void (*kernel)(Given...), void** given) {
    call(kernel, given, std::index_sequence_for<Given...>());
}
