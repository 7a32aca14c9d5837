/* Structured payloads: repeated tag, length, value. */
#include "wire.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

uint32_t load_u32(const uint8_t *p)
{
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

void store_u32(uint8_t *p, uint32_t value)
{
    for (int i = 0; i < 4; i++)
        p[i] = (uint8_t)(value >> (8 * i));
}

struct tlv tlv_read(const struct frame *f)
{
    struct tlv t = {.at = f->payload, .end = f->payload + f->size};
    if (t.at < t.end)
        t.next_tag = *t.at;
    return t;
}

/* A value is terminated in place, by overwriting the tag after it, which is read first. The last
 * value is followed by the frame's end byte, which is no longer needed. */
bool tlv_next(struct tlv *t)
{
    if (t->bad || t->at == t->end)
        return false;
    if (t->end - t->at < 5 || load_u32(t->at + 1) > (size_t)(t->end - t->at - 5)) {
        t->bad = true;
        return false;
    }
    t->tag = t->next_tag;
    t->size = load_u32(t->at + 1);
    t->value = t->at + 5;
    t->at = t->value + t->size;
    if (t->at < t->end)
        t->next_tag = *t->at;
    *t->at = 0;
    return true;
}

uint64_t tlv_int(struct tlv *t)
{
    if (t->size != 8) {
        t->bad = true;
        return 0;
    }
    return load_u32(t->value) | (uint64_t)load_u32(t->value + 4) << 32;
}

char *tlv_text(struct tlv *t)
{
    if (memchr(t->value, 0, t->size))
        t->bad = true;
    return (char *)t->value;
}

void reply_bytes(struct reply *r, uint8_t tag, const void *value, size_t size)
{
    if (size > sizeof r->data - 5 || r->size > sizeof r->data - 5 - size)
        return;
    r->data[r->size] = tag;
    store_u32(r->data + r->size + 1, (uint32_t)size);
    memcpy(r->data + r->size + 5, value, size);
    r->size += 5 + size;
}

void reply_text(struct reply *r, uint8_t tag, const char *value)
{
    reply_bytes(r, tag, value, strlen(value));
}

void reply_int(struct reply *r, uint8_t tag, uint64_t value)
{
    uint8_t bytes[8];
    store_u32(bytes, (uint32_t)value);
    store_u32(bytes + 4, (uint32_t)(value >> 32));
    reply_bytes(r, tag, bytes, sizeof bytes);
}

void reply_error(struct reply *r, int error, const char *format, ...)
{
    char text[1000]; /* a step of the identity says up to 900 bytes */
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    r->size = 0;
    reply_int(r, 1, (uint64_t)error);
    reply_text(r, 2, text);
}
