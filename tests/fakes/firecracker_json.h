/* Parse the bodies of requests, and check them against the facts of the API document. */
#ifndef FIRECRACKER_JSON_H
#define FIRECRACKER_JSON_H

#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct fact {
	const char *request, *field, *type; /* the type is a JSON schema type */
	bool required;
	const char *values; /* "|File|Uffd|", or empty */
	long long minimum, maximum;
};
#include "facts.h" /* static const struct fact facts[]; static const char *const requests[] */

static char request[96], fault[512], scratch[256]; /* the current request, and the reason of its refusal */

static bool refuse(const char *format, ...)
{
	va_list arguments;
	va_start(arguments, format);
	vsnprintf(fault, sizeof fault, format, arguments);
	va_end(arguments);
	return false;
}

static struct leaf { char field[96], value[1024]; } leaves[96];
static int leaf_count;
static const char *at;

static const char *leaf(const char *field)
{
	for (int i = 0; i < leaf_count; i++)
		if (strcmp(leaves[i].field, field) == 0)
			return leaves[i].value;
	return NULL;
}

static void blanks(void)
{
	while (*at == ' ' || *at == '\n' || *at == '\t' || *at == '\r')
		at++;
}

static bool string(char *into, size_t room)
{
	size_t size = 0;
	if (*at++ != '"')
		return refuse("a string is expected");
	for (; *at != '"'; at++) {
		if (!*at || *at == '\\' || size + 1 >= room)
			return refuse("a string is malformed, or longer than the double can take");
		into[size++] = *at;
	}
	into[size] = 0;
	at++;
	return true;
}

static const struct fact *known(const char *field)
{
	for (size_t i = 0; i < sizeof facts / sizeof *facts; i++)
		if (strcmp(facts[i].request, request) == 0 && strcmp(facts[i].field, field) == 0)
			return &facts[i];
	return NULL;
}

static bool value(const char *field, const char *kind, const struct fact *fact);

static bool members(const char *field)
{
	char names[32][96];
	int count = 0;
	at++;
	for (blanks(); *at != '}'; blanks()) {
		char name[48], path[96];
		if (count == 32 || !string(name, sizeof name))
			return refuse("an object is malformed");
		snprintf(path, sizeof path, "%s%s%s", field, *field ? "." : "", name);
		const struct fact *fact = known(path);
		if (!fact)
			return refuse("An error occurred when deserializing the json body of a request: unknown field `%s`.", path);
		snprintf(names[count++], sizeof names[0], "%s", path);
		blanks();
		if (*at++ != ':' || !value(path, fact->type, fact))
			return fault[0] ? false : refuse("an object is malformed");
		blanks();
		if (*at == ',')
			at++;
		blanks();
	}
	at++;
	for (size_t i = 0; i < sizeof facts / sizeof *facts; i++) {
		const char *dot = strrchr(facts[i].field, '.');
		size_t parent = dot ? (size_t)(dot - facts[i].field) : 0;
		if (!facts[i].required || strcmp(facts[i].request, request) || parent != strlen(field) || strncmp(facts[i].field, field, parent))
			continue;
		bool there = false;
		for (int n = 0; n < count; n++)
			there |= strcmp(names[n], facts[i].field) == 0;
		if (!there)
			return refuse("An error occurred when deserializing the json body of a request: missing field `%s`.", facts[i].field);
	}
	return true;
}

static bool value(const char *field, const char *kind, const struct fact *fact)
{
	struct leaf *l = &leaves[leaf_count];
	blanks();
	if (strcmp(kind, "object") == 0 && *at == '{')
		return members(field);
	if (strcmp(kind, "array") == 0 && *at == '[') {
		char element[96];
		snprintf(element, sizeof element, "%s[]", field);
		at++;
		for (blanks(); *at != ']'; blanks()) {
			if (!value(element, "object", NULL))
				return false;
			blanks();
			if (*at == ',')
				at++;
		}
		at++;
		return true;
	}
	if (leaf_count == 95)
		return refuse("the double cannot take so many fields");
	snprintf(l->field, sizeof l->field, "%s", field);
	if (strcmp(kind, "string") == 0 && *at == '"') {
		char text[1024];
		if (!string(text, sizeof text))
			return false;
		snprintf(l->value, sizeof l->value, "%s", text);
		snprintf(scratch, sizeof scratch, "|%.150s|", text);
		if (fact && *fact->values && !strstr(fact->values, scratch))
			return refuse("unknown variant `%s` of `%s`", text, field);
	} else if (strcmp(kind, "boolean") == 0 && (strncmp(at, "true", 4) == 0 || strncmp(at, "false", 5) == 0)) {
		snprintf(l->value, sizeof l->value, "%s", *at == 't' ? "true" : "false");
		at += *at == 't' ? 4 : 5;
	} else if (strcmp(kind, "integer") == 0 && *at >= '0' && *at <= '9') {
		char *end;
		long long number = strtoll(at, &end, 10);
		if (fact && (number < fact->minimum || number > fact->maximum))
			return refuse("%lld is out of the range of `%s`", number, field);
		snprintf(l->value, sizeof l->value, "%lld", number);
		at = end;
	} else {
		return refuse("invalid type of `%s`: %s is expected", field, kind);
	}
	leaf_count++;
	return true;
}

static bool check_body(const char *text)
{
	leaf_count = 0;
	at = text;
	return value("", "object", NULL);
}

#endif
