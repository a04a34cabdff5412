/* Streams read as cheaply as can be, with what went wrong counted.

   usage: client PORT STREAMS SECONDS PROMPT_BYTES ASK_IDS SPREAD_SECONDS WARM_SECONDS
   Each stream is a connection that asks again as soon as its answer is whole. They begin spread over
   SPREAD_SECONDS (an answer's time, so that later requests come spread too); what comes then and in
   the WARM_SECONDS after is not counted. Prints a line when it begins to count, and one of JSON at the
   end: chunks, requests, errors, percentiles of the time to the first chunk (ms), the longest
   time for which a stream brought nothing while it was under way (ms), and its own CPU time (s). */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MOST 65536
#define SAMPLES (1 << 20)

typedef struct { int fd, begun, round; int64_t asked, last; char tail[8]; int tail_size; } Stream;

static Stream streams[MOST];
static float ttft[SAMPLES];
static int64_t chunks, requests, errors, samples, longest;
static char *request;
static size_t request_size;

static int64_t now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

static void make_request(int port, int prompt, int ids) {
    char *body = malloc((size_t)prompt + 256), head[256];
    int n = sprintf(body, "{\"model\":\"mock\",\"stream\":true,\"max_tokens\":64,%s\"prompt\":\"",
                    ids ? "\"return_token_ids\":true," : "");
    memset(body + n, 'a', (size_t)prompt);
    n += prompt + sprintf(body + n + prompt, "\"}");
    int h = sprintf(head, "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n"
                    "Content-Type: application/json\r\nContent-Length: %d\r\n\r\n", port, n);
    request = malloc((size_t)(h + n));
    memcpy(request, head, (size_t)h);
    memcpy(request + h, body, (size_t)n);
    request_size = (size_t)(h + n);
}

static void ask(Stream *s) {
    s->asked = s->last = now_us();
    s->begun = s->tail_size = 0;
    s->round++; /* the first asking is part of setting up */
    if (send(s->fd, request, request_size, MSG_NOSIGNAL) != (ssize_t)request_size) errors++;
}

static void take(Stream *s, int go_on) {
    static char data[1 << 16];
    ssize_t n = recv(s->fd, data + 8, sizeof data - 8, MSG_DONTWAIT);
    if (n <= 0) {
        if (n < 0 && errno == EAGAIN) return;
        errors++;
        close(s->fd);
        s->fd = -1;
        return;
    }
    int64_t now = now_us();
    if (s->begun && now - s->last > longest) longest = now - s->last;
    s->last = now;
    /* The last bytes of the piece before stand in front, so that no mark is cut in two. */
    char *from = data + 8 - s->tail_size;
    memcpy(from, s->tail, (size_t)s->tail_size);
    size_t size = (size_t)n + (size_t)s->tail_size;
    for (char *at = from; (at = memmem(at, size - (size_t)(at - from), "data: {", 7)); at += 7) {
        chunks++;
        if (!s->begun && s->round > 1 && samples < SAMPLES) ttft[samples++] = (float)(now - s->asked) / 1000.0f;
        s->begun = 1;
    }
    if (memmem(from, size, "HTTP/1.1 5", 10) || memmem(from, size, "HTTP/1.1 4", 10)) errors++;
    if (size >= 7 && !memcmp(from + size - 7, "\r\n0\r\n\r\n", 7)) {
        requests++;
        if (go_on) ask(s);
        return;
    }
    s->tail_size = size < 6 ? (int)size : 6;
    memcpy(s->tail, from + size - (size_t)s->tail_size, (size_t)s->tail_size);
}

static void read_until(int poll, int64_t end) {
    struct epoll_event ready[512];
    while (now_us() < end) {
        int64_t left = (end - now_us()) / 1000;
        int n = epoll_wait(poll, ready, 512, left > 20 ? 20 : left > 0 ? (int)left : 0);
        for (int i = 0; i < n; i++) {
            Stream *s = &streams[ready[i].data.u32];
            if (s->fd >= 0) take(s, 1);
        }
    }
}

static double cpu_seconds(void) {
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    return (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec)
         + (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
}

static int by_value(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv) {
    if (argc != 8) return 2;
    int port = atoi(argv[1]), count = atoi(argv[2]), poll = epoll_create1(0), on = 1;
    struct rlimit many = {MOST, MOST};
    setrlimit(RLIMIT_NOFILE, &many);
    make_request(port, atoi(argv[4]), atoi(argv[5]));
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(port)};
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int64_t opened = now_us();
    double between = atof(argv[6]) * 1e6 / count;
    for (int i = 0; i < count; i++) {
        read_until(poll, opened + (int64_t)(i * between));
        Stream *s = &streams[i];
        s->fd = socket(AF_INET, SOCK_STREAM, 0);
        if (connect(s->fd, (struct sockaddr *)&at, sizeof at)) { perror("client"); return 1; }
        setsockopt(s->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        struct epoll_event e = {.events = EPOLLIN, .data.u32 = (uint32_t)i};
        epoll_ctl(poll, EPOLL_CTL_ADD, s->fd, &e);
        ask(s);
    }
    read_until(poll, now_us() + (int64_t)(atof(argv[7]) * 1e6));
    printf("started\n");
    fflush(stdout);
    longest = 0;
    int64_t begin = now_us(), before = chunks, asked = requests, first_sample = samples;
    double used = cpu_seconds();
    read_until(poll, begin + (int64_t)(atof(argv[3]) * 1e6));
    double seconds = (double)(now_us() - begin) / 1e6;
    int64_t silent = 0;
    for (int i = 0; i < count; i++)
        if (streams[i].fd >= 0 && now_us() - streams[i].last > 1000000) silent++;
    float *t = ttft + first_sample;
    int64_t m = samples - first_sample;
    qsort(t, (size_t)m, sizeof *t, by_value);
    printf("{\"chunks\": %ld, \"seconds\": %.3f, \"requests\": %ld, \"errors\": %ld, \"silent\": %ld, "
           "\"longest_gap_ms\": %.1f, \"ttft_p50_ms\": %.2f, \"ttft_p99_ms\": %.2f, \"cpu_s\": %.3f}\n",
           (long)(chunks - before), seconds, (long)(requests - asked), (long)errors, (long)silent,
           (double)longest / 1000.0, m ? t[m / 2] : -1.0f, m ? t[m * 99 / 100] : -1.0f,
           cpu_seconds() - used);
    return 0;
}
