/* In the place of libtorch_cuda.so and the NVIDIA libraries: the names that torch's other libraries look up there when they are
 * loaded. Nobody calls them on a machine without a GPU; who does is ended with the name. build.sh writes symbols.h. */
#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A C++ compiler has type descriptions begin at the third word of this table. */
extern const void *const class_type_info[] __asm__("_ZTVN10__cxxabiv117__class_type_infoE");

#define FUNCTION(name) \
    void name(void) { fprintf(stderr, "%s was called, but this torch has no CUDA (tests/lab/vllm/stub.c)\n", #name); abort(); }
#define TYPE(name) const void *const name[2] = {class_type_info + 2, #name + sizeof("_ZTI") - 1};
#define VTABLE(name) const void *const name[64] = {0};

/* The two that importing torch.distributed calls have bodies of their own below. */
#define _ZN4c10d15get_gil_checkerEv unused_1
#define _ZN4c10d16ProcessGroupNCCL7OptionsC1Eb unused_2
#include "symbols.h"
#undef _ZN4c10d15get_gil_checkerEv
#undef _ZN4c10d16ProcessGroupNCCL7OptionsC1Eb

/* c10d::get_gil_checker(): a place where torch puts a function. */
void *_ZN4c10d15get_gil_checkerEv(void) {
    static void *checker;
    return &checker;
}

/* c10d::ProcessGroupNCCL::Options::Options(bool): the default of an argument, which nobody uses. All zero with the virtual table
 * that libtorch_python.so has of it, it can be counted and freed. */
extern const void *const nccl_options_vtable[] __asm__("_ZTVN4c10d16ProcessGroupNCCL7OptionsE");
void _ZN4c10d16ProcessGroupNCCL7OptionsC1Eb(const void **options, _Bool high_priority) {
    (void)high_priority;
    memset(options, 0, malloc_usable_size(options));
    options[0] = nccl_options_vtable + 2;
}
