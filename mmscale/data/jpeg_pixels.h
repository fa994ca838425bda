/*
 * From coefficients to pixels: the inverse transforms and the colours of jpeg.c, which see.
 *
 * What is computed, down to the rounding, is what libjpeg-turbo 3.1 computes: in its jidctred.c (transforms to four,
 * two or one sample of eight), its jidctint.c (to all eight) and its jdcolor.c.
 */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Into the function for the processor at hand, and with what is constant there: without it nothing becomes a vector. */
#define INLINE static inline __attribute__((always_inline))

enum { LANES = 16 }; /* blocks side by side, all transformed at once */

enum { CONST_BITS = 13, PASS_BITS = 2 };

/* Fractions times 2^13, as libjpeg rounds them. */
enum {
    F_0_211 = 1730, F_0_298 = 2446, F_0_390 = 3196, F_0_509 = 4176, F_0_541 = 4433, F_0_601 = 4926, F_0_720 = 5906,
    F_0_765 = 6270, F_0_850 = 6967, F_0_899 = 7373, F_1_061 = 8697, F_1_175 = 9633, F_1_272 = 10426, F_1_451 = 11893,
    F_1_501 = 12299, F_1_847 = 15137, F_1_961 = 16069, F_2_053 = 16819, F_2_172 = 17799, F_2_562 = 20995,
    F_3_072 = 25172, F_3_624 = 29692,
};

/*
 * The largest sum of a block's coefficients, as absolute values, that is taken. Up to here no value or sum of two
 * leaves 16 bits between the two passes of a transform (the first one's gain is below 5.55), and none leaves 32 bits
 * within them, so that libjpeg-turbo's versions for SSE2, AVX2 and NEON agree. To one sample it has a version in C
 * alone, which takes the result modulo 1024. Photographs stay far below; noise of black and white does not.
 */
enum { MAX_SUM = 5900, MAX_SUM_TO_ONE = 4000 };

/* Unsigned, since blocks of a larger sum, which are refused in the end, may overflow it. */
typedef uint32_t number;

INLINE number descale(number value, int bits) {
    return (number)((int32_t)(value + (1u << (bits - 1))) >> bits);
}

INLINE uint32_t clamp(int32_t value) {
    return (uint32_t)(value < 0 ? 0 : value > 255 ? 255 : value);
}

/* From the coefficients of a row or a column, save the fifth, to four means of two samples (jidctred.c). */
INLINE void to_four(const number x[8], number y[4], int bits) {
    number even = x[0] << (CONST_BITS + 1);
    number turn = x[2] * F_1_847 - x[6] * F_0_765;
    number inner = x[1] * F_1_061 - x[3] * F_2_172 + x[5] * F_1_451 - x[7] * F_0_211;
    number outer = x[1] * F_2_562 + x[3] * F_0_899 - x[5] * F_0_601 - x[7] * F_0_509;
    y[0] = descale(even + turn + outer, bits + 1);
    y[1] = descale(even - turn + inner, bits + 1);
    y[2] = descale(even - turn - inner, bits + 1);
    y[3] = descale(even + turn - outer, bits + 1);
}

/* From the first one and those of odd frequency to two means of four samples (jidctred.c). */
INLINE void to_two(const number x[8], number y[2], int bits) {
    number even = x[0] << (CONST_BITS + 2);
    number odd = x[1] * F_3_624 - x[3] * F_1_272 + x[5] * F_0_850 - x[7] * F_0_720;
    y[0] = descale(even + odd, bits + 2);
    y[1] = descale(even - odd, bits + 2);
}

/* From all to eight samples (jidctint.c). */
INLINE void to_eight(const number x[8], number y[8], int bits) {
    number sum = (x[0] + x[4]) << CONST_BITS, difference = (x[0] - x[4]) << CONST_BITS;
    number turn = (x[2] + x[6]) * F_0_541;
    number low = turn + x[2] * F_0_765, high = turn - x[6] * F_1_847;
    number even[4] = {sum + low, difference + high, difference - high, sum - low};
    number all = (x[1] + x[3] + x[5] + x[7]) * F_1_175;
    number z1 = (x[1] + x[7]) * F_0_899, z2 = (x[3] + x[5]) * F_2_562;
    number z3 = all - (x[3] + x[7]) * F_1_961, z4 = all - (x[1] + x[5]) * F_0_390;
    number odd[4] = {x[1] * F_1_501 - z1 + z4, x[3] * F_3_072 - z2 + z3, x[5] * F_2_053 - z2 + z4,
                     x[7] * F_0_298 - z1 + z3};
    for (int i = 0; i < 4; i++) {
        y[i] = descale(even[i] + odd[i], bits);
        y[7 - i] = descale(even[i] - odd[i], bits);
    }
}

/* To one mean of eight samples (jidctred.c). */
INLINE void to_one(const number x[8], number y[1], int bits) {
    y[0] = descale(x[0] << CONST_BITS, bits);
}

INLINE void transform_line(int size, const number x[8], number y[8], int bits) {
    if (size == 8)
        to_eight(x, y, bits);
    else if (size == 4)
        to_four(x, y, bits);
    else if (size == 2)
        to_two(x, y, bits);
    else
        to_one(x, y, bits);
}

/* Whether a row or a column of coefficients has a part in a transform to `size` samples. */
INLINE bool has_part(int size, int index) {
    return index == 0 || size == 8 || (size == 4 && index != 4) || (size == 2 && index % 2 == 1);
}

/* corner: the rows and columns of coefficients from this one on hold zeros. False: the sum is too large. */
INLINE bool transform(int size, int corner, const int16_t (*batch)[LANES], const int16_t (*steps)[LANES],
                      uint8_t (*tile)[8 * LANES]) {
    int32_t sums[LANES] = {0}, largest = 0;
    number lines[8][8][LANES];
    for (int column = 0; column < corner; column++) {
        if (!has_part(size, column))
            continue;
        for (int lane = 0; lane < LANES; lane++) {
            number x[8] = {0}, y[8];
            int32_t sum = 0;
            for (int row = 0; row < corner; row++) {
                if (!has_part(size, row))
                    continue;
                int32_t value = batch[8 * row + column][lane] * steps[8 * row + column][lane];
                sum += abs(value);
                x[row] = (number)value;
            }
            sums[lane] += sum;
            transform_line(size, x, y, CONST_BITS - PASS_BITS);
            for (int row = 0; row < size; row++)
                lines[row][column][lane] = y[row];
        }
    }
    for (int lane = 0; lane < LANES; lane++)
        largest = sums[lane] > largest ? sums[lane] : largest;
    for (int row = 0; row < size; row++) {
        uint32_t samples[2 * LANES]; /* four to a number: compilers make vectors of that, but not of single bytes */
        for (int lane = 0; lane < LANES; lane++) {
            number x[8] = {0}, y[8];
            uint32_t packed[2] = {0};
            for (int column = 0; column < corner; column++)
                if (has_part(size, column))
                    x[column] = lines[row][column][lane];
            transform_line(size, x, y, CONST_BITS + PASS_BITS + 3);
            for (int column = 0; column < size; column++)
                packed[column / 4] |= clamp((int32_t)y[column] + 128) << (8 * (column % 4));
            if (size == 8) {
                samples[2 * lane] = packed[0];
                samples[2 * lane + 1] = packed[1];
            } else {
                samples[lane] = packed[0];
            }
        }
        if (size >= 4)
            memcpy(tile[row], samples, (size_t)size * LANES);
        else
            for (int i = 0; i < size * LANES; i++)
                tile[row][i] = (uint8_t)(samples[i / size] >> (8 * (i % size)));
    }
    return largest <= (size == 1 ? MAX_SUM_TO_ONE : MAX_SUM);
}

/* Chroma mostly has nothing outside the corner of 4 x 4 low frequencies. */
INLINE bool is_low(const int16_t (*batch)[LANES]) {
    int16_t any[LANES] = {0}, all = 0;
    for (int row = 0; row < 8; row++)
        for (int column = row < 4 ? 4 : 0; column < 8; column++)
            for (int lane = 0; lane < LANES; lane++)
                any[lane] |= batch[8 * row + column][lane];
    for (int lane = 0; lane < LANES; lane++)
        all |= any[lane];
    return all == 0;
}

/* One row of the tiles, as JFIF's YCbCr, to RGB with libjpeg's rounding (jdcolor.c). Writes two bytes beyond. */
INLINE void to_rgb(const uint8_t *luma, const uint8_t *blue, const uint8_t *red, uint8_t *rgb) {
    uint32_t pixels[4 * LANES];
    for (int i = 0; i < 4 * LANES; i++) {
        int32_t y = luma[i], cb = blue[i] - 128, cr = red[i] - 128;
        uint32_t r = clamp(y + ((91881 * cr + 32768) >> 16));
        uint32_t g = clamp(y + ((-22554 * cb - 46802 * cr + 32768) >> 16));
        uint32_t b = clamp(y + ((116130 * cb + 32768) >> 16));
        pixels[i] = r | g << 8 | b << 16;
    }
    for (int i = 0; i < 4 * LANES; i += 2) {
        uint64_t two = pixels[i] | (uint64_t)pixels[i + 1] << 24;
        memcpy(rgb + 3 * i, &two, 8);
    }
}
