/*
 * Decodes baseline JPEGs at 1/2, 1/4 or 1/8 of their size, to the very pixels that libjpeg-turbo gives.
 *
 * Only the common case is taken: one scan, 8 bits, Huffman codes, grey or YCbCr at 4:4:4, 4:2:2 or 4:2:0, with or
 * without restart markers, and not a byte out of place. Anything else is "not mine", and the caller turns to
 * libjpeg-turbo: what is wrong with a file is never judged here.
 *
 * The time goes into the Huffman codes, each of which says where the next one begins. Hence the design: the stuffed
 * zero bytes are taken out first, so that bits are loaded eight bytes at a time without a test; one look at the next
 * LOOK bits gives up to two coefficients with their values, and the end of the block behind them; and coefficients
 * lie so that LANES blocks are transformed at once, in plain loops that compilers turn into vector instructions.
 *
 * What the format says is from ITU-T T.81; what libjpeg-turbo 3.1 makes of it from its jidctred.c and jidctint.c (the
 * transforms and how they round), jdcolor.c (the colours), jdmaster.c (which component gets which transform),
 * jdmarker.c and jdhuff.c (what passes without a warning).
 */

#include "jpeg_pixels.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "written for little-endian machines"
#endif

/* To be raised with every change of what the functions at the end take or give; see mmscale/data/jpeg.py. */
enum { INTERFACE = 1 };

enum {
    LOOK = 11,           /* 16 KiB a table: those in use stay in the L1 cache */
    MCU_BLOCKS = 6,      /* at 4:2:0 */
    MCU_BYTES = 6 * 256, /* more than an MCU can take: 64 codes a block, 16 bits each and 15 for the value */
    CLEAN = 16384,       /* bytes of the scan that are held without their stuffing */
    MAX_SIDE = 65500,    /* libjpeg's limit */
    SPEC = 16 + 256,     /* a Huffman table as files have it: how many codes of each length, then the symbols */
};

enum {
    SOF0 = 0xC0, SOF1 = 0xC1, DHT = 0xC4, RST0 = 0xD0, SOI = 0xD8, EOI = 0xD9, SOS = 0xDA, DQT = 0xDB, DRI = 0xDD,
    APP0 = 0xE0, APP1 = 0xE1, APP14 = 0xEE, APP15 = 0xEF, COM = 0xFE,
    TRUNCATED = 0x100, /* no marker: the data ends */
};

/* How far a look moves on in a block of 64 coefficients, beside a coefficient's run and itself. */
enum { FULL = 64, NO_LOOK = 64, END = 128 };

/* Where a look puts what is no value. */
enum { NOWHERE = 128 };

struct huffman {
    uint8_t spec[SPEC];  /* what the rest was made from: most files share their tables, and making them takes time */
    bool made;
    uint32_t limit[17];  /* by length: the first 16 bits that belong to a longer code */
    int32_t symbol[17];  /* by length: from a code to its symbol's place in the spec */
    uint32_t one[1 << LOOK];
    uint64_t two[1 << LOOK];
};

struct component {
    unsigned id, quant, dc, ac;
};

struct decoder {
    /* What the header says. */
    unsigned height, width, components;
    unsigned across, down; /* luma blocks in an MCU, which has one block of each chroma component */
    unsigned interval;     /* MCUs between restart markers; 0: there are none */
    bool app1;             /* there is such a segment: it may hold EXIF's orientation */
    size_t length, scan;   /* of the file; where the scan begins */
    struct component component[3];
    bool has_quant[4], has_spec[2][4];
    uint8_t quant[4][64]; /* in zigzag order */
    uint8_t spec[2][4][SPEC];
    /* What is kept from file to file: tables for DC and AC. */
    struct huffman huffman[2][4];
    /* Room to work in. A batch is LANES blocks side by side, and a last row for what goes nowhere. */
    int16_t batch[3][65][LANES];
    int16_t steps[3][64][LANES]; /* of quantisation */
    uint8_t tile[3][8][8 * LANES];
    uint8_t clean[CLEAN + MCU_BYTES + 32];
};

static const uint8_t NATURAL[64] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6,
    7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46,
    53, 60, 61, 54, 47, 55, 62, 63,
};

/* ---- Huffman tables ---- */

/* The value of `size` bits, one or more (T.81, figure F.12). */
INLINE int extend(unsigned bits, unsigned size) {
    return bits >> (size - 1) ? (int)bits : (int)bits - (1 << size) + 1;
}

/*
 * one[]: what the next LOOK bits begin with. Bits 0-7: how many belong to it; 8-15: how far it moves on; 16-31: the
 * value. 0 where code and value do not fit, or there is no such code.
 */
static void fill_one(struct huffman *table, bool dc, unsigned code, unsigned length, unsigned symbol) {
    unsigned run = dc ? 0 : symbol >> 4, size = symbol & 15, left = LOOK - length;
    if (size > left || (size == 0 && run != 0 && run != 15))
        return;
    unsigned moves = !dc && symbol == 0 ? END : run + 1;
    for (unsigned rest = 0; rest < 1u << left; rest++) {
        int value = size ? extend(rest >> (left - size), size) : 0;
        table->one[code << left | rest] = (uint32_t)(value & 0xFFFF) << 16 | moves << 8 | (length + size);
    }
}

/*
 * two[]: a coefficient, another one if it fits, and the block's end if that fits too. Bits 0-7: how many bits belong
 * to it all; 8-15: how far it all moves on; 16-23, 24-31: how far on the two values go; 32-47, 48-63: the values.
 */
static void fill_two(struct huffman *table) {
    for (unsigned bits = 0; bits < 1u << LOOK; bits++) {
        unsigned length = 0, moves = 0, values = 0, places[2] = {NOWHERE, NOWHERE};
        uint64_t value[2] = {0, 0};
        for (;;) {
            uint32_t next = table->one[bits << length & ((1u << LOOK) - 1)];
            unsigned kind = next >> 8 & 255;
            if (next == 0 || length + (next & 255) > LOOK || (values == 2 && kind != END))
                break;
            length += next & 255;
            moves += kind;
            if (kind == END)
                break;
            places[values] = next >> 16 ? moves - 1 : NOWHERE;
            value[values++] = next >> 16;
        }
        table->two[bits] = value[1] << 48 | value[0] << 32 | (uint64_t)places[1] << 24 | places[0] << 16 |
                           (length ? moves : NO_LOOK) << 8 | length;
    }
}

/* False for what is no prefix code, by libjpeg's rules. */
static bool make_huffman(struct huffman *table, const uint8_t *spec, bool dc) {
    if (table->made && memcmp(table->spec, spec, SPEC) == 0)
        return true;
    table->made = false;
    memcpy(table->spec, spec, SPEC);
    memset(table->one, 0, sizeof table->one);
    unsigned code = 0, number = 0;
    for (unsigned length = 1; length <= 16; length++, code <<= 1) {
        table->symbol[length] = 16 + (int32_t)number - (int32_t)code;
        for (unsigned i = 0; i < spec[length - 1]; i++, code++, number++) {
            unsigned symbol = spec[16 + number];
            if (code + 1 >= 1u << length || (dc && symbol > 15))
                return false;
            if (length <= LOOK)
                fill_one(table, dc, code, length, symbol);
        }
        table->limit[length] = code << (16 - length);
    }
    if (!dc)
        fill_two(table);
    table->made = true;
    return true;
}

/* ---- The header ---- */

static unsigned big16(const uint8_t *at) {
    return (unsigned)at[0] << 8 | at[1];
}

static bool read_quant(struct decoder *d, const uint8_t *at, size_t size) {
    for (; size >= 65; at += 65, size -= 65) {
        if (at[0] > 3) /* of 16 bits, or a fifth table */
            return false;
        memcpy(d->quant[at[0]], at + 1, 64);
        d->has_quant[at[0]] = true;
    }
    return size == 0;
}

static bool read_huffman(struct decoder *d, const uint8_t *at, size_t size) {
    while (size >= 17) {
        unsigned kind = at[0] >> 4, number = at[0] & 15, symbols = 0;
        for (int length = 1; length <= 16; length++)
            symbols += at[length];
        if (kind > 1 || number > 3 || symbols > 256 || symbols > size - 17)
            return false;
        memset(d->spec[kind][number], 0, SPEC);
        memcpy(d->spec[kind][number], at + 1, 16 + symbols);
        d->has_spec[kind][number] = true;
        at += 17 + symbols;
        size -= 17 + symbols;
    }
    return size == 0;
}

static bool read_frame(struct decoder *d, const uint8_t *at, size_t size) {
    if (d->components != 0 || size < 6 || at[0] != 8)
        return false;
    d->height = big16(at + 1);
    d->width = big16(at + 3);
    d->components = at[5];
    if ((d->components != 1 && d->components != 3) || size != 6 + 3 * d->components)
        return false;
    for (unsigned i = 0; i < d->components; i++) {
        const uint8_t *c = at + 6 + 3 * i;
        d->component[i] = (struct component){.id = c[0], .quant = c[2]};
        if (i > 0 && c[1] != 0x11)
            return false;
        for (unsigned j = 0; j < i; j++)
            if (d->component[j].id == c[0])
                return false;
    }
    d->across = at[7] >> 4;
    d->down = at[7] & 15;
    bool sampling = (d->across == 1 && d->down == 1) ||
                    (d->components == 3 && d->across == 2 && (d->down == 1 || d->down == 2));
    return sampling && d->height > 0 && d->width > 0 && d->height <= MAX_SIDE && d->width <= MAX_SIDE;
}

static bool read_scan(struct decoder *d, const uint8_t *at, size_t size) {
    unsigned components = d->components;
    if (components == 0 || size != 4 + 2 * components || at[0] != components)
        return false;
    for (unsigned i = 0; i < components; i++) {
        struct component *c = &d->component[i];
        c->dc = at[2 + 2 * i] >> 4;
        c->ac = at[2 + 2 * i] & 15;
        if (at[1 + 2 * i] != c->id || c->quant > 3 || c->dc > 3 || c->ac > 3)
            return false;
        if (!d->has_quant[c->quant] || !d->has_spec[0][c->dc] || !d->has_spec[1][c->ac])
            return false;
    }
    return memcmp(at + 1 + 2 * components, "\0\x3F\0", 3) == 0; /* all 64 coefficients, all their bits */
}

/* Everything up to the scan. False: not mine. */
static bool read_header(struct decoder *d, const uint8_t *data, size_t length) {
    memset(d, 0, offsetof(struct decoder, huffman));
    bool jfif = false, adobe = false, done = false;
    unsigned transform = 1; /* from YCbCr */
    size_t at = 2;
    if (length < 2 || data[0] != 0xFF || data[1] != SOI)
        return false;
    while (!done) {
        if (length - at < 4 || data[at] != 0xFF)
            return false;
        unsigned marker = data[at + 1];
        size_t size = big16(data + at + 2);
        if (size < 2 || size > length - at - 2)
            return false;
        const uint8_t *segment = data + at + 4;
        at += 2 + size;
        size -= 2;
        bool mine = true;
        switch (marker) {
        case SOF0:
        case SOF1:
            mine = read_frame(d, segment, size);
            break;
        case DHT:
            mine = read_huffman(d, segment, size);
            break;
        case DQT:
            mine = read_quant(d, segment, size);
            break;
        case DRI:
            mine = size == 2;
            d->interval = mine ? big16(segment) : 0;
            break;
        case SOS:
            mine = done = read_scan(d, segment, size);
            break;
        case APP0:
            if (size >= 14 && memcmp(segment, "JFIF", 5) == 0) {
                jfif = true;
                mine = segment[5] == 1; /* libjpeg warns of any other version */
            }
            break;
        case APP14:
            if (size >= 12 && memcmp(segment, "Adobe", 5) == 0) {
                adobe = true;
                transform = segment[11];
            }
            break;
        default:
            mine = (marker > APP0 && marker <= APP15) || marker == COM;
            d->app1 |= marker == APP1;
        }
        if (!mine)
            return false;
    }
    d->length = length;
    d->scan = at;
    const struct component *c = d->component;
    bool ycc = jfif || adobe || (c[0].id == 1 && c[1].id == 2 && c[2].id == 3);
    return d->components == 1 || (ycc && transform == 1);
}

/* ---- The bits of the scan ---- */

struct source {
    const uint8_t *data;
    size_t at, length;
    uint8_t *clean;
    const uint8_t *end;   /* of the clean bytes; zeros follow */
    const uint8_t *limit; /* where an MCU may begin at the latest */
    unsigned marker;      /* what ends the segment; 0 while that is not in sight */
};

struct bits {
    uint64_t buffer; /* the next ones, from the highest bit down */
    unsigned count;  /* how many there are; the bits below them are zeros, or those that will come next */
    const uint8_t *next;
    uint64_t ahead; /* the bytes at `next`, loaded before they are needed */
};

INLINE void look_ahead(struct bits *in) {
    uint64_t bytes;
    memcpy(&bytes, in->next, 8);
    in->ahead = __builtin_bswap64(bytes);
}

/* Fills up to 56 bits or more. */
INLINE void refill(struct bits *in) {
    in->buffer |= in->ahead >> in->count;
    in->next += (63 - in->count) >> 3;
    in->count |= 56;
    look_ahead(in);
}

INLINE void drop(struct bits *in, unsigned count) {
    in->buffer <<= count;
    in->count -= count;
}

/* Moves what is left to the front of the clean bytes and cleans more behind it, up to a marker. */
static void clean_more(struct source *source, struct bits *in) {
    size_t left = (size_t)(source->end - in->next);
    memmove(source->clean, in->next, left);
    in->next = source->clean;
    uint8_t *to = source->clean + left, *full = source->clean + CLEAN;
    while (to < full && !source->marker) {
        const uint8_t *from = source->data + source->at;
        size_t room = source->length - source->at;
        if (room > (size_t)(full - to))
            room = (size_t)(full - to);
        const uint8_t *stop = memchr(from, 0xFF, room);
        size_t plain = stop ? (size_t)(stop - from) : room;
        memcpy(to, from, plain);
        to += plain;
        source->at += plain;
        if (source->length - source->at < 2) {
            source->marker = TRUNCATED;
        } else if (stop) {
            if (stop[1] == 0)
                *to++ = 0xFF;
            else
                source->marker = stop[1];
            source->at += 2;
        }
    }
    memset(to, 0, MCU_BYTES + 32);
    source->end = to;
    source->limit = source->marker ? to + 8 : to - MCU_BYTES;
    look_ahead(in);
}

static void begin_segment(struct source *source, struct bits *in) {
    source->marker = 0;
    source->end = source->clean;
    *in = (struct bits){.next = source->clean};
    clean_more(source, in);
}

/* The marker that ends the segment, if it comes right here: the last byte begun, and not passed. Otherwise 0. */
static unsigned end_segment(struct source *source, struct bits *in) {
    if (!source->marker)
        clean_more(source, in);
    ptrdiff_t left = 8 * (source->end - in->next) + (ptrdiff_t)in->count;
    return left >= 0 && left < 8 ? source->marker : 0;
}

/* ---- Blocks ---- */

/* The next symbol by the code's definition (T.81, figure F.16). False: there is no such code. */
static bool next_symbol(struct bits *in, const struct huffman *table, unsigned *symbol) {
    refill(in);
    unsigned bits = (unsigned)(in->buffer >> 48), length = 1;
    while (length <= 16 && bits >= table->limit[length])
        length++;
    if (length > 16)
        return false;
    *symbol = table->spec[(int32_t)(bits >> (16 - length)) + table->symbol[length]];
    drop(in, length);
    return true;
}

static int next_value(struct bits *in, unsigned size) {
    if (size == 0)
        return 0;
    int value = extend((unsigned)(in->buffer >> (64 - size)), size);
    drop(in, size);
    return value;
}

/*
 * Writes a block's coefficients to one lane of a batch that holds zeros. False: not mine.
 *
 * last: the component's last DC. place: where in a batch the coefficients go, by their number and beyond.
 */
INLINE bool decode_block(struct bits *in, const struct huffman *dc, const struct huffman *ac, unsigned *last,
                         int16_t *block, const uint16_t *place) {
    unsigned symbol;
    refill(in);
    uint32_t difference = dc->one[in->buffer >> (64 - LOOK)];
    if (difference) {
        drop(in, difference & 255);
        *last += (unsigned)(int16_t)(difference >> 16);
    } else {
        if (!next_symbol(in, dc, &symbol))
            return false;
        *last += (unsigned)next_value(in, symbol);
        refill(in);
    }
    block[0] = (int16_t)*last;

    /* As in a look: bits 0-7: how many were taken since the refill; 8-15: the number of the next coefficient. */
    uint64_t taken = 1 << 8;
    for (int looks = 56 / LOOK - 1;; looks = 56 / LOOK) { /* what a refill is enough for, first less the DC's look */
        uint64_t look = 0, before = 0;
        for (int i = 0; i < looks && !(taken & (FULL | END) << 8); i++) {
            const uint16_t *to = place + (taken >> 8 & 255);
            before = in->buffer;
            look = ac->two[before >> (64 - LOOK)];
            block[to[look >> 16 & 255]] = (int16_t)(look >> 32);
            block[to[look >> 24 & 255]] = (int16_t)(look >> 48);
            in->buffer <<= look & 63;
            taken += look;
        }
        in->count -= taken & 255;
        unsigned k = taken >> 8 & 255;
        if (k == FULL || (k > END && k < END + FULL))
            return true;
        if (k > FULL) {
            /* NO_LOOK, or one that took bits of the next block: one symbol by itself instead. */
            k -= look >> 8 & 255;
            in->buffer = before;
            in->count += look & 63;
            if (!next_symbol(in, ac, &symbol))
                return false;
            unsigned run = symbol >> 4, size = symbol & 15;
            if (symbol == 0)
                return true;
            if (k + run >= FULL || (size == 0 && run != 15))
                return false;
            block[place[k + run]] = (int16_t)next_value(in, size);
            k += run + 1;
            if (k == FULL)
                return true;
        }
        taken = k << 8;
        refill(in);
    }
}

/* ---- Pixels ---- */

INLINE bool transform_batch(struct decoder *d, unsigned number, unsigned size) {
    const int16_t(*batch)[LANES] = d->batch[number], (*steps)[LANES] = d->steps[number];
    uint8_t(*tile)[8 * LANES] = d->tile[number];
    switch (size) {
    case 8:
        return is_low(batch) ? transform(8, 4, batch, steps, tile) : transform(8, 8, batch, steps, tile);
    case 4:
        return is_low(batch) ? transform(4, 4, batch, steps, tile) : transform(4, 8, batch, steps, tile);
    case 2:
        return transform(2, 8, batch, steps, tile);
    default:
        return transform(1, 1, batch, steps, tile);
    }
}

struct region {
    unsigned top, left, height, width;
};

/* Transforms the batches and writes what the region has of the pixels. top, left: of the batches. False: not mine. */
INLINE bool paint(struct decoder *d, unsigned size, unsigned top, unsigned left, struct region region,
                  uint8_t *pixels) {
    unsigned width = LANES * size, height = d->down * size;
    if (top >= region.top + region.height || top + height <= region.top || left >= region.left + region.width ||
        left + width <= region.left)
        return true;
    bool halved = d->across == 2; /* both chroma components in one batch, side by side */
    unsigned chroma = d->down, batches = d->components == 1 ? 1 : halved ? chroma + 1 : 3;
    for (unsigned i = 0; i < batches; i++)
        if (!transform_batch(d, i, i >= chroma && d->down == 2 ? 2 * size : size))
            return false;

    unsigned begin = left < region.left ? region.left - left : 0;
    unsigned end = left + width > region.left + region.width ? region.left + region.width - left : width;
    for (unsigned row = 0; row < height; row++) {
        uint8_t rgb[3 * 4 * LANES + 2], wide[2][4 * LANES] = {{0}};
        if (top + row < region.top || top + row >= region.top + region.height)
            continue;
        const uint8_t *luma = d->tile[row / size][row % size];
        const uint8_t *blue = d->tile[chroma][row], *red = halved ? blue + width : d->tile[chroma + 1][row];
        if (d->components == 1) {
            for (unsigned i = 0; i < width; i++)
                rgb[3 * i] = rgb[3 * i + 1] = rgb[3 * i + 2] = luma[i];
        } else if (halved && d->down == 1) {
            for (unsigned i = 0; i < width; i++) {
                wide[0][i] = blue[i / 2];
                wide[1][i] = blue[(width + i) / 2];
            }
            to_rgb(luma, wide[0], wide[1], rgb);
        } else {
            to_rgb(luma, blue, red, rgb);
        }
        size_t to = (size_t)(top + row - region.top) * region.width + (left + begin - region.left);
        memcpy(pixels + 3 * to, rgb + 3 * begin, 3 * (size_t)(end - begin));
    }
    return true;
}

/* A block of an MCU: its tables, and where the group's first one goes. The next ones go `step` lanes further. */
struct block {
    const struct huffman *dc, *ac;
    unsigned *last;
    int16_t *lane;
    unsigned step;
};

/* size: of a luma block in the result, 8 / scale. False: not mine. */
INLINE bool decode_scan(struct decoder *d, const uint8_t *data, unsigned size, struct region region,
                        uint8_t *pixels) {
    unsigned last[3] = {0}, blocks = 0;
    struct block block[MCU_BLOCKS];
    for (unsigned i = 0; i < d->components; i++) {
        const struct component *c = &d->component[i];
        unsigned across = i == 0 ? d->across : 1, down = i == 0 ? d->down : 1;
        bool beside = i == 2 && d->across == 2; /* the second half of the first chroma component's batch */
        unsigned batch = i == 0 ? 0 : d->down + i - 1 - beside, lane = beside ? LANES / 2 : 0;
        for (unsigned y = 0; y < down; y++, batch++) {
            for (unsigned x = 0; x < across; x++)
                block[blocks++] = (struct block){&d->huffman[0][c->dc], &d->huffman[1][c->ac], &last[i],
                                                 &d->batch[batch][0][lane + x], across};
            for (unsigned k = 0; k < 64; k++)
                for (unsigned l = lane; l < LANES; l++)
                    d->steps[batch][NATURAL[k]][l] = d->quant[c->quant][k];
        }
    }
    uint16_t place[256];
    for (unsigned k = 0; k < 256; k++)
        place[k] = (k < FULL ? NATURAL[k] : 64) * LANES;

    struct source source = {.data = data, .at = d->scan, .length = d->length, .clean = d->clean};
    struct bits in;
    begin_segment(&source, &in);
    unsigned across = (d->width + 8 * d->across - 1) / (8 * d->across);
    unsigned down = (d->height + 8 * d->down - 1) / (8 * d->down);
    unsigned group = LANES / d->across, until_restart = d->interval, restarts = 0;
    for (unsigned y = 0; y < down; y++) {
        for (unsigned x = 0; x < across; x += group) {
            memset(d->batch, 0, sizeof d->batch);
            for (unsigned i = 0; i < group && x + i < across; i++) {
                if (d->interval && until_restart-- == 0) {
                    if (end_segment(&source, &in) != RST0 + (restarts++ & 7))
                        return false;
                    begin_segment(&source, &in);
                    memset(last, 0, sizeof last);
                    until_restart = d->interval - 1;
                }
                for (const struct block *b = block; b < block + blocks; b++)
                    if (!decode_block(&in, b->dc, b->ac, b->last, b->lane + i * b->step, place))
                        return false;
                if (in.next > source.limit) {
                    if (source.marker)
                        return false;
                    clean_more(&source, &in);
                }
            }
            if (!paint(d, size, y * d->down * size, x * d->across * size, region, pixels))
                return false;
        }
    }
    return end_segment(&source, &in) == EOI;
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(PORTABLE) /* a test builds it with PORTABLE */
#define WITH_AVX2
/* The same once more for what nearly every machine has: twice as wide vectors, and shifts that are one instruction. */
__attribute__((target("avx2,bmi2"))) static bool decode_scan_avx2(struct decoder *d, const uint8_t *data, unsigned size,
                                                                  struct region region, uint8_t *pixels) {
    return decode_scan(d, data, size, region, pixels);
}
#endif

/* ---- What Python calls ---- */

#define PUBLIC __attribute__((visibility("default")))

PUBLIC unsigned mmscale_jpeg_interface(void) {
    return INTERFACE;
}

/* Bytes of a struct decoder. It begins as zeros, is one thread's at a time, and best lies at a multiple of 64. */
PUBLIC size_t mmscale_jpeg_decoder_size(void) {
    return sizeof(struct decoder);
}

/* Reads the header. facts: height, width, whether there is an APP1 segment. False: not mine. */
PUBLIC bool mmscale_jpeg_open(struct decoder *d, const uint8_t *data, size_t length, unsigned facts[3]) {
    if (!read_header(d, data, length)) {
        d->length = 0;
        return false;
    }
    facts[0] = d->height;
    facts[1] = d->width;
    facts[2] = d->app1;
    return true;
}

/*
 * Decodes the file that was opened last. scale: 2, 4 or 8, what height and width are divided by, rounded up. The
 * region is in pixels of the result; pixels: [height, width, 3], RGB. False: not mine, and what pixels hold is void.
 */
PUBLIC bool mmscale_jpeg_decode(struct decoder *d, const uint8_t *data, size_t length, unsigned scale, unsigned top,
                                unsigned left, unsigned height, unsigned width, uint8_t *pixels) {
    if (length == 0 || length != d->length || (scale != 2 && scale != 4 && scale != 8))
        return false;
    /* Of the scales that round a tiny picture to the same size, libjpeg-turbo's interface takes the largest. */
    if (d->height < 8 && d->width < 8)
        return false;
    unsigned full_height = (d->height + scale - 1) / scale, full_width = (d->width + scale - 1) / scale;
    if (top > full_height || height > full_height - top || left > full_width || width > full_width - left)
        return false;
    for (unsigned i = 0; i < d->components; i++) {
        const struct component *c = &d->component[i];
        if (!make_huffman(&d->huffman[0][c->dc], d->spec[0][c->dc], true) ||
            !make_huffman(&d->huffman[1][c->ac], d->spec[1][c->ac], false))
            return false;
    }
    struct region region = {top, left, height, width};
#ifdef WITH_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2"))
        return decode_scan_avx2(d, data, 8 / scale, region, pixels);
#endif
    return decode_scan(d, data, 8 / scale, region, pixels);
}
