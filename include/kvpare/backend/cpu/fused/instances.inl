// The loops of one set as explicit instances, see sets.hpp. Included behind loops.inl, in the set's namespace and region.
// Loops without a parameter have an unused one, so that they are compiled where they are called or here, as the others.
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
KVPARE_INSTANCE void unpack_ternary_units<false>(const Layout&, const std::byte*, Index, std::byte*);
KVPARE_INSTANCE void place_row<false>(const Layout&, std::byte*, Index, const std::uint8_t*);
#define KVPARE_QUANTIZE(rule, rounding)                                                                    \
  KVPARE_INSTANCE bool quantize_row<Rule::rule, Rounding::rounding>(int, bool, const float*, Index, Index, \
                                                                    std::uint8_t*, half*, half*);
#define KVPARE_ROUNDINGS(rule) KVPARE_QUANTIZE(rule, even) KVPARE_QUANTIZE(rule, away) KVPARE_QUANTIZE(rule, up)
KVPARE_ROUNDINGS(amax)
KVPARE_ROUNDINGS(extreme)
KVPARE_ROUNDINGS(min_max)
#undef KVPARE_QUANTIZE
#undef KVPARE_ROUNDINGS
KVPARE_INSTANCE void add_listed_keys<false>(const ListedNumbers&, const TileRows&, const float*, Index, float*, Index);
KVPARE_INSTANCE void add_listed_values<false>(const ListedNumbers&, const TileRows&, const float*, Index, Index, float*,
                                              Index);
KVPARE_INSTANCE void add_listed_block<false>(const ListedNumbers&, Index, Index, const float*, float*);
KVPARE_INSTANCE void turn_table<false>(const TurnedQuery&, const Position*, float*, float*);
KVPARE_INSTANCE void turn_tables<false>(TurnedQuery&);
KVPARE_INSTANCE void turn_rows_back<false>(const float*, Index, Index, const float*, const float*, float*);
KVPARE_INSTANCE void turn_query<false>(const TurnedQuery&, Position, const float*, Index, float*);
KVPARE_INSTANCE void score_turned_block<false>(const TurnedQuery&, const float*, const float*, const float*, const float*,
                                               const float*, Index, std::uint64_t, Index, float*, Index);
#undef KVPARE_INSTANCE
#undef KVPARE_KEYS
#undef KVPARE_VALUES
#undef KVPARE_NARROW_VALUES
#undef KVPARE_ALL_VALUES
#endif
