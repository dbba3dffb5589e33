// The loops of one set as explicit instances, see sets.hpp. Included behind loops.inl, in the set's namespace and region.
#if defined(KVPARE_COMPILED_LOOPS)
#if KVPARE_COMPILED_LOOPS == KVPARE_SET_NUMBER
#define KVPARE_INSTANCE template
#else
#define KVPARE_INSTANCE extern template
#endif
#define KVPARE_KEYS(bits, table, wide)                                                                                 \
  KVPARE_INSTANCE void prepare<bits, table, wide>(const Layout&, const Values&, const float*, Index, Index, std::byte*); \
  KVPARE_INSTANCE void score<bits, table, wide>(const KeyCall&);
#define KVPARE_VALUES(bits, levels) \
  KVPARE_INSTANCE void accumulate_codes<bits, Levels::levels, true>(const ValueCall&);
#if KVPARE_DOTS
#define KVPARE_NARROW_VALUES(bits, levels) \
  KVPARE_INSTANCE void accumulate_codes<bits, Levels::levels, false>(const ValueCall&);
KVPARE_KEYS(5, false, false)
KVPARE_KEYS(4, false, false)
KVPARE_KEYS(3, false, false)
KVPARE_KEYS(2, false, false)
KVPARE_KEYS(1, false, false)
KVPARE_KEYS(4, true, false)
KVPARE_KEYS(3, true, false)
KVPARE_KEYS(2, true, false)
KVPARE_KEYS(1, true, false)
#else
#define KVPARE_NARROW_VALUES(bits, levels)
KVPARE_KEYS(4, false, true)
KVPARE_KEYS(3, false, true)
KVPARE_KEYS(2, false, true)
KVPARE_KEYS(1, false, true)
KVPARE_KEYS(4, true, true)
KVPARE_KEYS(3, true, true)
KVPARE_KEYS(2, true, true)
KVPARE_KEYS(1, true, true)
#endif
KVPARE_KEYS(8, false, true)
KVPARE_KEYS(5, false, true)
#define KVPARE_ALL_VALUES(bits, levels) KVPARE_VALUES(bits, levels) KVPARE_NARROW_VALUES(bits, levels)
KVPARE_ALL_VALUES(8, plain)
KVPARE_ALL_VALUES(5, plain)
KVPARE_ALL_VALUES(4, plain)
KVPARE_ALL_VALUES(3, plain)
KVPARE_ALL_VALUES(2, plain)
KVPARE_ALL_VALUES(1, plain)
KVPARE_ALL_VALUES(5, flipped)
KVPARE_ALL_VALUES(4, flipped)
KVPARE_ALL_VALUES(3, flipped)
KVPARE_ALL_VALUES(2, flipped)
KVPARE_ALL_VALUES(4, table)
KVPARE_ALL_VALUES(3, table)
KVPARE_ALL_VALUES(2, table)
KVPARE_ALL_VALUES(1, table)
KVPARE_ALL_VALUES(4, flipped_table)
KVPARE_ALL_VALUES(3, flipped_table)
KVPARE_ALL_VALUES(2, flipped_table)
KVPARE_ALL_VALUES(1, flipped_table)
KVPARE_INSTANCE void score_small<false>(const KeyCall&);
KVPARE_INSTANCE void score_small<true>(const KeyCall&);
KVPARE_INSTANCE void accumulate_small<false>(const ValueCall&);
KVPARE_INSTANCE void accumulate_small<true>(const ValueCall&);
#define KVPARE_BLOCK(bits)                                                                                             \
  KVPARE_INSTANCE void block_of_keys<bits>(const Layout&, const Values&, const float*, const std::byte*, Index, const float*, \
                                           const float*, float*);
KVPARE_BLOCK(4)
KVPARE_BLOCK(3)
KVPARE_BLOCK(2)
KVPARE_BLOCK(1)
#undef KVPARE_BLOCK
KVPARE_INSTANCE void score_mixed<false>(const MixedKeyCall&);
KVPARE_INSTANCE void accumulate_mixed<true>(const MixedValueCall&);
#if KVPARE_DOTS
KVPARE_INSTANCE void accumulate_mixed<false>(const MixedValueCall&);
#endif
#undef KVPARE_INSTANCE
#undef KVPARE_KEYS
#undef KVPARE_VALUES
#undef KVPARE_NARROW_VALUES
#undef KVPARE_ALL_VALUES
#endif
