// What a program of many files may leave to one: see kvpare/compiled.hpp.
#pragma once

#if !defined(KVPARE_COMPILED_LOOPS)
#define KVPARE_COMPILED_HERE 1
#define KVPARE_COMPILED_INLINE inline
#elif KVPARE_COMPILED_LOOPS == 7
#define KVPARE_COMPILED_HERE 1
#define KVPARE_COMPILED_INLINE
#else
#define KVPARE_COMPILED_HERE 0
#define KVPARE_COMPILED_INLINE
#endif
