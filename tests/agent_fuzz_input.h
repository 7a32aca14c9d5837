/* The inputs of the agent's fuzz: recorded sessions of hosts, changed; and a check of the answer. */
#include <dirent.h>

#define SESSIONS_MAX 256
#define FRAMES_MAX 64
#define STREAMS_SEEN 64
#define INPUT_MAX (1u << 20)

/* ---- the corpus: recorded bytes of hosts, as frames ---- */

struct recorded {
    uint8_t type;
    uint16_t stream;
    size_t size;
    const uint8_t *payload;
};

struct session {
    struct recorded frames[FRAMES_MAX];
    size_t count;
};

static struct session sessions[SESSIONS_MAX];
static size_t session_count;

static void parse_session(const uint8_t *data, size_t size)
{
    struct session *s = &sessions[session_count];
    for (size_t at = 0; at + FRAME_OVERHEAD <= size && s->count < FRAMES_MAX;) {
        size_t length = data[at + 3] | (size_t)data[at + 4] << 8;
        if (data[at] == 0 || at + FRAME_OVERHEAD + length > size || data[at + FRAME_HEADER + length] != 0xA5) {
            at++; /* padding, or the HELLO of protocol 1 */
            continue;
        }
        if (data[at] != HELLO)
            s->frames[s->count++] = (struct recorded){.type = data[at], .stream = (uint16_t)(data[at + 1] | data[at + 2] << 8), .size = length, .payload = data + at + FRAME_HEADER};
        at += FRAME_OVERHEAD + length;
    }
    session_count += s->count > 0;
}

static void load_corpus(const char *path)
{
    struct dirent **names;
    int count = scandir(path, &names, NULL, alphasort);
    for (int i = 0; i < count; i++) {
        char file[PATH_MAX];
        size_t size;
        snprintf(file, sizeof file, "%s/%s", path, names[i]->d_name);
        char *data = *names[i]->d_name == '.' || session_count == SESSIONS_MAX ? NULL : load_file(file, &size);
        if (data)
            parse_session((const uint8_t *)data, size);
    }
    if (session_count == 0)
        failed("there is no corpus");
}

/* ---- an input: what one host sends, as bytes ---- */

struct input {
    size_t size, sent;
    bool strict; /* no second HELLO and no violation, so every byte of the answer must be a frame */
    uint8_t data[INPUT_MAX];
    /* the answer */
    size_t got;
    bool open;
    uint64_t credit[STREAMS_SEEN];
    uint8_t answer[1u << 17];
};

static struct input inputs[WIRES];

static void put_bytes(struct input *in, const void *data, size_t size)
{
    if (size <= sizeof in->data - in->size) {
        memcpy(in->data + in->size, data, size);
        in->size += size;
    }
}

static void put_frame(struct input *in, uint8_t type, uint16_t stream, const uint8_t *payload, size_t size)
{
    uint8_t header[FRAME_HEADER] = {type, (uint8_t)stream, (uint8_t)(stream >> 8), (uint8_t)size, (uint8_t)(size >> 8)};
    if (size + FRAME_OVERHEAD > sizeof in->data - in->size)
        return;
    put_bytes(in, header, sizeof header);
    put_bytes(in, payload, size);
    put_bytes(in, "\xA5", 1);
    if (type == WINDOW && size == 4 && stream < STREAMS_SEEN)
        in->credit[stream] += load_u32(payload);
}

static void put_hello(struct input *in)
{
    uint8_t payload[24] = "COPPICE2";
    for (size_t i = 8; i < sizeof payload; i++)
        payload[i] = (uint8_t)number_below(256);
    put_frame(in, HELLO, 0, payload, sizeof payload);
}

/* Change a payload of fields so that it mostly stays one. */
static size_t change_fields(uint8_t *payload, size_t size)
{
    for (size_t at = 0; at + 5 <= size;) {
        size_t length = load_u32(payload + at + 1);
        if (length > size - at - 5)
            break;
        if (one_in(4) && length == 8) {
            uint64_t value = interesting();
            memcpy(payload + at + 5, &value, 8);
        } else if (one_in(8) && length > 0) {
            payload[at + 5 + number_below(length)] = (uint8_t)number_below(256);
        } else if (one_in(16)) {
            payload[at] = (uint8_t)number_below(26);
        } else if (one_in(64)) {
            store_u32(payload + at + 1, (uint32_t)interesting());
            break;
        } else if (one_in(32)) {
            memmove(payload + at, payload + at + 5 + length, size - at - 5 - length);
            size -= 5 + length;
            continue;
        }
        at += 5 + length;
    }
    return size;
}

static size_t change_bytes(uint8_t *payload, size_t size)
{
    for (uint64_t n = 1 + number_below(3); n > 0; n--) {
        if (size > 0 && one_in(2))
            payload[number_below(size)] = (uint8_t)number_below(256);
        else if (size > 0 && one_in(2))
            size = number_below(size);
        else if (size < HOST_PAYLOAD_MAX)
            payload[size++] = (uint8_t)number_below(256);
    }
    return size;
}

static void put_changed(struct input *in, const struct recorded *f, uint16_t shift)
{
    static const uint8_t types[] = {PING, FORGET, PART, HEALTH, IDENTITY, SYNC, CLOCK, SHARED_RANDOM, EXEC, STDIN, STDIN_EOF, SIGNAL, RESIZE,
                                    ATTACH, LIST, LEAVE, END, WINDOW, CONNECT, DATA, DATA_EOF, FILE_READ, FILE_WRITE, FILE_STAT};
    uint8_t payload[HOST_PAYLOAD_MAX], type = f->type;
    uint16_t stream = (uint16_t)(f->stream + shift);
    size_t size = f->size;
    memcpy(payload, f->payload, size);
    if (one_in(6))
        size = change_fields(payload, size);
    if (one_in(20))
        size = change_bytes(payload, size);
    if (one_in(20))
        type = one_in(4) ? (uint8_t)(1 + number_below(255)) : types[number_below(sizeof types)];
    if (one_in(20))
        stream = one_in(3) ? (uint16_t)interesting() : (uint16_t)(1 + number_below(4));
    if (type == HELLO)
        in->strict = false;
    put_frame(in, type, stream, payload, size);
}

static void put_strange(struct input *in)
{
    uint8_t payload[HOST_PAYLOAD_MAX] = {0};
    uint64_t value = interesting();
    uint16_t stream = (uint16_t)(1 + number_below(4));
    memcpy(payload, &value, sizeof value);
    switch (number_below(8)) {
    case 0: put_frame(in, WINDOW, stream, payload, 4); break;
    case 1: put_frame(in, PING, 0, payload, number_below(sizeof payload)); break;
    case 2: put_frame(in, one_in(2) ? STDIN : DATA, stream, payload, number_below(sizeof payload)); break;
    case 3: put_frame(in, SIGNAL, stream, payload, 4); break;
    case 4: put_frame(in, PART, stream, payload, number_below(sizeof payload)); break;
    case 5: put_bytes(in, payload + sizeof value, number_below(300)); break; /* padding */
    case 6:
        in->strict = false;
        put_bytes(in, payload, sizeof value);
        break;
    default:
        in->strict = false;
        put_hello(in);
    }
}

static void make_input(struct input *in)
{
    in->size = in->sent = in->got = 0;
    in->strict = true;
    in->open = false;
    for (size_t i = 0; i < STREAMS_SEEN; i++)
        in->credit[i] = 0;
    if (one_in(16)) {
        uint8_t stale[64];
        for (size_t i = 0; i < sizeof stale; i++)
            stale[i] = (uint8_t)number_below(256);
        put_bytes(in, stale, number_below(sizeof stale));
    }
    put_hello(in);
    uint16_t shift = 0;
    for (uint64_t n = 1 + number_below(3); n > 0; n--, shift = (uint16_t)(shift + number_below(3))) {
        const struct session *s = &sessions[number_below(session_count)];
        for (size_t i = 0; i < s->count; i++) {
            if (one_in(12))
                continue;
            for (uint64_t times = one_in(16) ? 2 + number_below(3) : 1; times > 0; times--)
                put_changed(in, &s->frames[i], shift);
            if (one_in(12))
                put_strange(in);
        }
    }
    if (one_in(64) && in->size > 0) { /* a byte somewhere */
        in->data[number_below(in->size)] = (uint8_t)number_below(256);
        in->strict = false;
    }
}

/* ---- the host ---- */

static void check_frame(struct input *in, const uint8_t *frame, size_t size)
{
    uint16_t stream = (uint16_t)(frame[1] | frame[2] << 8);
    if (in->strict && frame[0] == ERROR && stream == 0)
        in->strict = false; /* the session ended with it */
    if (!in->strict || stream >= STREAMS_SEEN)
        return;
    if (frame[0] == STDOUT || frame[0] == STDERR || frame[0] == DATA) {
        if (size == 0)
            failed("a frame of output is empty");
        if (in->credit[stream] + CREDIT_SIZE < size)
            failed("more output than the host's credit");
        in->credit[stream] -= size; /* below zero it is the credit of a new stream that is used */
    } else if (frame[0] == OK || frame[0] == ERROR || frame[0] == EXIT) {
        in->credit[stream] = CREDIT_SIZE * 64; /* another request may follow on it */
    }
}

/* Take the agent's frames out of the answer. */
static void check_answer(struct input *in)
{
    size_t at = 0;
    while (in->got - at >= FRAME_OVERHEAD) {
        const uint8_t *frame = in->answer + at;
        size_t size = frame[3] | (size_t)frame[4] << 8;
        if (!in->open && frame[0] != HELLO_ACK && in->strict)
            failed("the first frame is no acknowledgement");
        if (frame[0] == 0 || size > 65535 - FRAME_OVERHEAD) {
            at++;
            continue;
        }
        if (in->got - at < size + FRAME_OVERHEAD)
            break;
        if (frame[FRAME_HEADER + size] != 0xA5) {
            if (in->strict)
                failed("a frame of the agent is malformed");
            at++;
            continue;
        }
        in->open = true;
        check_frame(in, frame, size);
        at += size + FRAME_OVERHEAD;
    }
    memmove(in->answer, in->answer + at, in->got - at);
    in->got -= at;
}

static void receive(struct input *in, int fd)
{
    for (int turns = 0; turns < 8; turns++) {
        ssize_t n = recv(fd, in->answer + in->got, sizeof in->answer - in->got, MSG_DONTWAIT);
        if (n <= 0)
            return;
        in->got += (size_t)n;
        check_answer(in);
    }
}

static bool send_some(struct input *in, int fd)
{
    size_t left = in->size - in->sent, size = one_in(4) ? 1 + number_below(64) : 4096 + number_below(100000);
    ssize_t n = left == 0 ? 0 : send(fd, in->data + in->sent, size < left ? size : left, MSG_DONTWAIT | MSG_NOSIGNAL);
    in->sent += n > 0 ? (size_t)n : 0;
    return in->sent == in->size || (n < 0 && errno != EAGAIN);
}
